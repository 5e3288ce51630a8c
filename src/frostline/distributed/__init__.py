"""Training on several ranks: what a data-parallel wrapper sends, and how the ranks agree."""

from frostline.distributed.agreement import Agreement
from frostline.distributed.upkeep import RESTLESS, UNEVEN, Upkeep

__all__ = ["RESTLESS", "UNEVEN", "Agreement", "Upkeep"]
