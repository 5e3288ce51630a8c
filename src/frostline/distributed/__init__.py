"""Training on several ranks: what a data-parallel wrapper sends, and how the ranks agree."""

from frostline.distributed.agreement import Agreement, from_first
from frostline.distributed.buckets import Buckets
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
    "from_first",
    "is_split",
    "put_back",
]
