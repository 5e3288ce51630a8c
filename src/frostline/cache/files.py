"""A file of slots: which of them are free, and whose the others are."""

from __future__ import annotations

import os
from collections import defaultdict

from frostline.cache.slots import HEADER_BYTES, PLACE_BYTES, Entry, Slot, pack_place, parse, places

__all__ = ["SlotFile", "write_all"]


class SlotFile:
    """Gives out the slots of one file. A slot is free, or one sample's.

    Args:
        number: of the file, among all in which a store has records.
        data: the open file with the slots.
        index: the open file that says where each begins; ``None`` where nobody will look for them again.
    """

    def __init__(self, number: int, data: int, index: int | None = None) -> None:
        self.number, self.data, self._index = number, data, index
        self.end = 0  # of the last slot that was given out
        self._named = 0  # of the last one in the index
        self._holders: dict[Slot, bytes] = {}
        self._free: defaultdict[int, dict[Slot, None]] = defaultdict(dict)

    def find(self) -> list[tuple[Slot, Entry | None]]:
        """The slots of an earlier run, and what their headers speak of; whether it is true shows when it is read."""
        if self._index is None:
            return []
        slots = places(os.pread(self._index, os.fstat(self._index).st_size, 0), self.number)
        self.end = self._named = slots[-1].offset + slots[-1].size if slots else 0
        # What follows the last slot that is known was allocated by nobody.
        os.ftruncate(self._index, len(slots) * PLACE_BYTES)
        os.lseek(self._index, 0, os.SEEK_END)
        if os.fstat(self.data).st_size > self.end:
            os.ftruncate(self.data, self.end)
        for slot in slots:
            self._free[slot.size][slot] = None
        return [(slot, parse(memoryview(os.pread(self.data, HEADER_BYTES, slot.offset)), slot)) for slot in slots]

    def reuse(self, size: int, key: bytes) -> Slot | None:
        """A free slot of ``size`` bytes, for the sample ``key`` from now on."""
        if not self._free[size]:
            return None
        slot, _ = self._free[size].popitem()
        self._holders[slot] = key
        return slot

    def append(self, size: int, key: bytes) -> Slot:
        """A new slot for the sample ``key``. They must be :meth:`named` in their order before they are written."""
        slot = Slot(self.end, size, self.number)
        self.end += size
        self._holders[slot] = key
        return slot

    def claim(self, slot: Slot, key: bytes) -> bool:
        """Whether a slot is, or becomes, that of the sample ``key``; not if it is another's."""
        if slot in self._free[slot.size]:
            del self._free[slot.size][slot]
            self._holders[slot] = key
        return self._holders.get(slot) == key

    def release(self, slot: Slot, key: bytes) -> None:
        """The sample ``key`` has no use for its slot any more."""
        if self._holders.get(slot) == key:
            del self._holders[slot]
            self._free[slot.size][slot] = None

    def clear(self) -> None:
        """Nobody has a slot any more; where nobody will look for them again, the space is given back."""
        for slot, key in list(self._holders.items()):
            self.release(slot, key)
        if self._index is None:
            os.ftruncate(self.data, 0)
            self.end = 0
            self._free.clear()

    def named(self, slot: Slot) -> None:
        """See to it that the index names a slot."""
        if self._index is not None and slot.offset >= self._named:
            write_all(self._index, pack_place(slot), None)
            self._named = slot.offset + slot.size

    def close(self) -> None:
        """Close both files."""
        os.close(self.data)
        if self._index is not None:
            os.close(self._index)


def write_all(file: int, data: bytes, offset: int | None) -> None:
    """Write every byte, at ``offset`` or where the file stands."""
    while data:
        done = os.write(file, data) if offset is None else os.pwrite(file, data, offset)
        data, offset = data[done:], None if offset is None else offset + done
