"""Training on several ranks: what a data-parallel wrapper sends, how ranks agree, and what is said of a lost one."""

from frostline.distributed.agreement import Agreement
from frostline.distributed.exchange import explain
from frostline.distributed.shards import NOT_CACHED_SPLIT, NOT_COMPRESSED_SPLIT, is_split, put_back
from frostline.distributed.upkeep import RESTLESS, UNEVEN, Upkeep

__all__ = [
    "NOT_CACHED_SPLIT",
    "NOT_COMPRESSED_SPLIT",
    "RESTLESS",
    "UNEVEN",
    "Agreement",
    "Upkeep",
    "explain",
    "is_split",
    "put_back",
]
