"""Reading slots: positional reads from several threads into one buffer, each checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from frostline.cache.slots import HEADER_BYTES, Entry
from frostline.cache.store import Record, aligned

__all__ = ["Reader"]

# Bytes of a record whose checksum takes less time than handing it to another thread.
_SMALL = 64 << 10


class Reader:
    """Reads what entries say is in the slots of files.

    Args:
        threads: readers at a time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frostline-read")

    def read(
        self, wanted: Iterable[Entry], files: Mapping[int, int], hands: int
    ) -> tuple[dict[bytes, Record], list[Entry]]:
        """The records of entries by sample, and the entries whose slots do not hold what they say.

        Args:
            wanted: what to read.
            files: the open files, by number.
            hands: threads at most.
        """
        entries = sorted(wanted, key=lambda entry: (entry.slot.file, entry.slot.offset))
        if not entries:
            return {}, []
        hands = min(hands, self._threads, len(entries))
        starts, total = [], 0
        for entry in entries:
            starts.append(total)
            total += aligned(entry.nbytes)
        buffer = torch.empty(total, dtype=torch.uint8)
        values, headers = buffer.numpy().data, memoryview(bytearray(HEADER_BYTES * len(entries)))
        sound = [False] * len(entries)

        def parts(place: int) -> tuple[memoryview, memoryview]:
            start = starts[place]
            header = headers[HEADER_BYTES * place : HEADER_BYTES * (place + 1)]
            return header, values[start : start + entries[place].nbytes]

        def check(place: int) -> bool:
            return entries[place].is_in(*parts(place))

        def read(hand: int) -> None:
            for place in range(hand, len(entries), hands):
                entry = entries[place]
                with suppress(OSError):
                    whole = os.preadv(files[entry.slot.file], parts(place), entry.slot.offset)
                    sound[place] = whole == HEADER_BYTES + entry.nbytes and (entry.nbytes < _SMALL or check(place))

        if hands == 1:
            read(0)
        else:
            list(self._pool.map(read, range(hands)))
        found, unsound = {}, []
        typed = {dtype: buffer.view(dtype) for dtype in {entry.dtype for entry in entries}}
        for place, (start, entry) in enumerate(zip(starts, entries, strict=True)):
            if sound[place] and (entry.nbytes >= _SMALL or check(place)):
                value = typed[entry.dtype].as_strided(entry.shape, entry.strides, start // entry.dtype.itemsize)
                found[entry.key] = Record(entry.depth, value)
            else:
                unsound.append(entry)
        return found, unsound

    def close(self) -> None:
        """Wait for the threads."""
        self._pool.shutdown()
