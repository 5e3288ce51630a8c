"""Where records are kept. ``Store`` is the protocol; ``MemoryStore`` keeps them in memory, a host's or a GPU's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["HOST", "MemoryStore", "Record", "Store", "aligned"]

HOST = torch.device("cpu")
_CHUNK = 16 << 20
_ALIGN = 64


def aligned(nbytes: int) -> int:
    """The bytes that a record takes in any tier: a multiple of 64."""
    return -(-nbytes // _ALIGN) * _ALIGN


class Record(NamedTuple):
    """One sample's boundary activation: the input of block ``depth``, real tokens only where that is safe."""

    depth: int
    value: Tensor


class Store(Protocol):
    """Keeps records within a budget. A record is whole or not there.

    ``torn`` counts records that were found damaged, ``lost`` those that were taken and then not kept, ``skipped`` those
    that were not taken because writing had not kept up. ``failure``: why nothing more is taken, if something broke.
    ``reads_ahead``: reading takes long enough that it is worth saying what will be asked for. ``device``: where it is
    cheapest to hand a record over.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def reads_ahead(self) -> bool: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def torn(self) -> int: ...

    @property
    def lost(self) -> int: ...

    @property
    def skipped(self) -> int: ...

    def expect(self, keys: Sequence[bytes]) -> None:
        """Records that will be asked for soon."""

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The records of some samples. The tensors are valid until the next ``put`` of their keys."""

    def holds(self, key: bytes) -> bool:
        """Whether there is a record of a sample."""

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        """Keep a record, over the sample's earlier one; ``False`` where the budget has no room for it."""

    def drop(self, key: bytes) -> None:
        """Forget a sample's record."""

    def depths(self) -> set[int]:
        """At which depths there are records."""

    def moved(self, depth: int) -> int:
        """The frost line is at ``depth`` now: forget deeper records (a thaw), and say how many there were."""

    def cool(self) -> None:
        """See to it that what is read next comes from where the records are, not from something faster in between."""

    def clear(self) -> None:
        """Forget every record."""

    def close(self) -> None:
        """Give everything back; nothing is asked of the store after that."""

    @property
    def records(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class MemoryStore:
    """Records in memory: slots in chunks of 16 MiB.

    A record that replaces one of the same size takes its slot in place, so an upgrade needs no further space.

    Args:
        budget: bytes at most.
        device: whose memory; the host's is pinned where a GPU is there.
    """

    def __init__(self, budget: int, device: torch.device = HOST) -> None:
        self.budget, self.device = budget, device
        self._pinned = device == HOST and torch.cuda.is_available()
        self._slots: dict[bytes, tuple[int, Tensor, Tensor]] = {}  # depth, bytes of the slot, the record in it
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._chunk: Tensor | None = None
        self._used = self._reserved = self._kept = 0

    torn = lost = skipped = 0  # memory neither tears nor keeps anybody waiting
    failure = None
    reads_ahead = False

    @property
    def records(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the records that are kept."""
        return self._kept

    def expect(self, keys: Sequence[bytes]) -> None:
        """Nothing to do: they are there."""

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        found = (self._slots.get(key) for key in keys)
        return [None if slot is None else Record(slot[0], slot[2]) for slot in found]

    def holds(self, key: bytes) -> bool:
        return key in self._slots

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        size = aligned(value.nbytes)
        old = self._slots.pop(key, None)
        self._kept -= old[2].nbytes if old is not None else 0
        if old is not None and old[1].nbytes != size:
            self._free[old[1].nbytes].append(old[1])
            old = None
        slot = old[1] if old is not None else self._slot(size)
        if slot is None:
            return False
        kept = slot[: value.nbytes].view(value.dtype).view(value.shape)
        kept.copy_(value)
        self._slots[key] = (depth, slot, kept)
        self._kept += kept.nbytes
        return True

    def drop(self, key: bytes) -> None:
        if (old := self._slots.pop(key, None)) is not None:
            self._kept -= old[2].nbytes
            self._free[old[1].nbytes].append(old[1])

    def cool(self) -> None:
        """Nothing to do: there is no faster copy of what is here."""

    def depths(self) -> set[int]:
        return {depth for depth, _, _ in self._slots.values()}

    def moved(self, depth: int) -> int:
        deeper = [key for key, (at, _, _) in self._slots.items() if at > depth]
        for key in deeper:
            self.drop(key)
        return len(deeper)

    def clear(self) -> None:
        self._slots.clear()
        self._free.clear()
        self._chunk, self._used, self._reserved, self._kept = None, 0, 0, 0

    def close(self) -> None:
        self.clear()

    def _slot(self, size: int) -> Tensor | None:
        if self._free[size]:
            return self._free[size].pop()
        if self._chunk is None or self._used + size > self._chunk.nbytes:
            chunk = min(max(_CHUNK, size), self.budget - self._reserved)
            if size > chunk:
                return None
            try:
                self._chunk = torch.empty(chunk, dtype=torch.uint8, device=self.device, pin_memory=self._pinned)
            except torch.OutOfMemoryError:  # of a GPU; training has it
                return None
            self._used, self._reserved = 0, self._reserved + chunk
        slot = self._chunk[self._used : self._used + size]
        self._used += size
        return slot
