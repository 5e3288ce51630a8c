"""Training on several ranks: what a data-parallel wrapper sends, how ranks agree, and what is said of a lost one."""

from frostline.distributed.agreement import Agreement, from_first
from frostline.distributed.buckets import Buckets
from frostline.distributed.exchange import exchange, explain
from frostline.distributed.shards import NOT_CACHED_SPLIT, NOT_COMPRESSED_SPLIT, is_split, put_back
from frostline.distributed.upkeep import RESTLESS, UNEVEN, Upkeep

__all__ = [
    "NOT_CACHED_SPLIT",
    "NOT_COMPRESSED_SPLIT",
    "RESTLESS",
    "UNEVEN",
    "Agreement",
    "Buckets",
    "Upkeep",
    "exchange",
    "explain",
    "from_first",
    "is_split",
    "put_back",
]
