"""Host memory that the ranks of a machine share."""

from __future__ import annotations

import os
from collections.abc import Callable

from frostline.cache.files import SlotFile
from frostline.cache.ranks import Circle
from frostline.cache.slotstore import SlotStore

__all__ = ["SharedStore"]


class SharedStore(SlotStore):
    """A :class:`~frostline.cache.slotstore.SlotStore` in memory.

    Its files have no name, so nothing is left of them once the last rank has ended, however it ends; and they are
    read and written by position, not mapped, so memory that has run out is an error and not a signal.

    Args:
        budget: bytes at most that this rank adds.
        prefix: hash (16 bytes) of the weights below a depth.
        circle: the ranks that share; none to try it.

    Raises:
        OSError: this system has no such files.
    """

    def __init__(self, budget: int, *, prefix: Callable[[int], bytes], circle: Circle | None = None) -> None:
        data = os.memfd_create("frostline-records")
        file = SlotFile(circle.number if circle is not None else 0, data)
        super().__init__([file], budget, prefix=prefix, queued=0, where="shared memory", circle=circle)
