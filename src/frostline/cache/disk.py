"""Records on disk: slots in one file, read by positional reads from several threads, written by one in the background.

A slot is written over in place when its record is upgraded; ``frostline.cache.slots`` has the format. Eleven libraries
were measured to be 1.1 to 25 times slower at cold random reads than positional reads from a flat file, so this is our
own.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from frostline.cache.slots import DTYPES, HEADER_BYTES, PLACE_BYTES, Entry, Slot, pack, pack_place, parse, places
from frostline.cache.store import Record, aligned

__all__ = ["DiskStore"]

logger = logging.getLogger("frostline")

# Bytes that may be read before they are asked for; where more are announced, the oldest batch is given up.
_AHEAD = 256 << 20
# Bytes of a record whose checksum takes less time than handing it to another thread.
_SMALL = 64 << 10


class DiskStore:
    """A :class:`~frostline.cache.store.Store` in a folder that only its owner can read.

    Args:
        folder: made if it is not there; records in it are found again.
        budget: bytes at most.
        prefix: hash (16 bytes) of the weights below a depth; a record under other weights is not used.
        threads: readers at a time.
        keep: leave the records there at :meth:`close`.
        queued: bytes that may wait to be written; where they are all taken, a record is skipped rather than waited for.

    Raises:
        BlockingIOError: another run uses the folder.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self, folder: str | Path, budget: int, *, prefix: Callable[[int], bytes], threads: int = 8,
        queued: int = 64 << 20, keep: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.budget = Path(folder), budget
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._prefix, self.queued, self._keep = prefix, queued, keep
        self._closed = False
        self._file = os.open(self.folder / "slots.bin", os.O_RDWR | os.O_CREAT, 0o600)
        self._places = os.open(self.folder / "slots.idx", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._places, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            os.close(self._places)
            raise
        self._entries: dict[bytes, Entry] = {}
        self._free: defaultdict[int, list[Slot]] = defaultdict(list)
        self._end = 0
        self._kept = 0
        self._waiting = 0
        self._lock = threading.Lock()
        self._threads = threads
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="frostline-read")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="frostline-ahead")
        self._coming: dict[bytes, tuple[Entry, Future[dict[bytes, Record]]]] = {}
        self._announced: OrderedDict[Future[dict[bytes, Record]], int] = OrderedDict()  # bytes not asked for yet
        self._queue: queue.Queue[tuple[bytes, int, Tensor] | None] = queue.Queue()
        self.failure: str | None = None
        self.torn = self.lost = 0
        try:
            self._open()
        except BaseException:
            os.close(self._file)
            os.close(self._places)
            raise
        self._writer = threading.Thread(target=self._write_on, name="frostline-write", daemon=True)
        self._writer.start()

    # -- Store -----------------------------------------------------------------------------------------------

    reads_ahead = True

    @property
    def records(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return self._kept

    def expect(self, keys: Sequence[bytes]) -> None:
        """Records that will be asked for soon: they are read meanwhile, off this thread."""
        with self._lock:
            wanted = {k: e for k in keys if k not in self._coming and (e := self._entries.get(k)) is not None}
            size = sum(entry.nbytes for entry in wanted.values())
            # What nobody has asked for in so long was announced in vain.
            while self._announced and sum(self._announced.values()) + size > _AHEAD:
                given_up, _ = self._announced.popitem(last=False)
                given_up.cancel()
                self._coming = {k: (e, found) for k, (e, found) in self._coming.items() if found is not given_up}
            if wanted and size <= _AHEAD:
                found = self._ahead.submit(self._fetch, wanted)
                self._announced[found] = size
                self._coming.update((key, (entry, found)) for key, entry in wanted.items())

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        """Records that have been read ahead, and the others now. A damaged one is forgotten."""
        wanted: dict[bytes, Entry] = {}
        coming: dict[bytes, Future[dict[bytes, Record]]] = {}
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                expected = self._coming.pop(key, None)
                if expected is not None:
                    self._announced[expected[1]] -= expected[0].nbytes
                    if not self._announced[expected[1]]:
                        del self._announced[expected[1]]
                if entry is None:
                    continue
                if expected is not None and expected[0] is entry:  # not written over since
                    coming[key] = expected[1]
                else:
                    wanted[key] = entry
        records = self._fetch(wanted)
        for key, found in coming.items():
            if (record := found.result().get(key)) is not None:
                records[key] = record
        return [records.get(key) for key in keys]

    def holds(self, key: bytes) -> bool:
        return key in self._entries

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        if self.failure is not None or value.dtype not in DTYPES or value.dim() > 4 or not value.nbytes:
            return False
        with self._lock:
            if self._waiting and self._waiting + value.nbytes > self.queued:
                return False
            self._waiting += value.nbytes
        self._queue.put((key, depth, value.contiguous().clone()))
        return True

    def depths(self) -> set[int]:
        with self._lock:
            return {entry.depth for entry in self._entries.values()}

    def drop_deeper(self, depth: int) -> int:
        self.flush()
        with self._lock:
            deeper = [key for key, entry in self._entries.items() if entry.depth > depth]
            for key in deeper:
                self._release(key)
        return len(deeper)

    def clear(self) -> None:
        self.flush()
        with self._lock:
            for key in list(self._entries):
                self._release(key)

    def flush(self) -> None:
        """Wait until everything that was put is written."""
        self._queue.join()

    def cool(self) -> None:
        """Write everything out and drop it from the page cache: what is read next comes from the disk."""
        self.flush()
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Stop reading and writing. Without ``keep`` the records are user data that nobody asked to be kept: gone."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._ahead.shutdown()
        self._readers.shutdown()
        self._coming.clear()
        if not self._keep:
            for name in ("slots.bin", "slots.idx", "manifest.json"):
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):  # not empty: somebody else's files
                self.folder.rmdir()
        os.close(self._file)
        fcntl.flock(self._places, fcntl.LOCK_UN)  # a forked worker of a loader may hold a copy of the handle
        os.close(self._places)

    # -- writing ---------------------------------------------------------------------------------------------

    def _write_on(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except Exception as error:
                # A full disk, or weights that cannot be hashed, costs further records, never the run.
                self.failure = f"{self.folder}: {error}"
                self.lost += 1
                logger.debug("writing failed", exc_info=True)
            finally:
                with self._lock:
                    self._waiting -= item[2].nbytes
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, key: bytes, depth: int, value: Tensor) -> None:
        size = HEADER_BYTES + aligned(value.nbytes)
        with self._lock:
            # While it is written over, a slot holds no record.
            if key in self._entries:
                self._release(key)
            slot = self._free[size].pop() if self._free[size] else None
            if slot is None and self._end + size > self.budget:
                self.lost += 1
                return
        if slot is None:
            slot = Slot(self._end, size)
            _write_all(self._places, pack_place(slot), None)
            self._end += size
        entry, header, payload = pack(slot, key, depth, self._prefix(depth), value)
        written = os.pwritev(self._file, [header, payload], slot.offset)
        if written != len(header) + value.nbytes:
            _write_all(self._file, (header + bytes(payload))[written:], slot.offset + written)
        with self._lock:
            self._entries[key] = entry
            self._kept += value.nbytes

    # -- reading ---------------------------------------------------------------------------------------------

    def _fetch(self, wanted: dict[bytes, Entry]) -> dict[bytes, Record]:
        """Read slots side by side into one buffer, in the order of the file; a damaged one is forgotten."""
        entries = sorted(wanted.values(), key=lambda entry: entry.slot.offset)
        if not entries:
            return {}
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
            for place in range(hand, len(entries), self._threads):
                entry = entries[place]
                with suppress(OSError):
                    whole = os.preadv(self._file, parts(place), entry.slot.offset) == HEADER_BYTES + entry.nbytes
                    sound[place] = whole and (entry.nbytes < _SMALL or check(place))

        list(self._readers.map(read, range(min(self._threads, len(entries)))))
        found = {}
        typed = {dtype: buffer.view(dtype) for dtype in {entry.dtype for entry in entries}}
        for place, (start, entry) in enumerate(zip(starts, entries, strict=True)):
            if sound[place] and (entry.nbytes >= _SMALL or check(place)):
                value = typed[entry.dtype].as_strided(entry.shape, entry.strides, start // entry.dtype.itemsize)
                found[entry.key] = Record(entry.depth, value)
            else:
                self._forget(entry)
        return found

    def _forget(self, entry: Entry) -> None:
        with self._lock:
            # The writer may have put a new record there meanwhile; then nothing was torn.
            if self._entries.get(entry.key) is entry:
                self.torn += 1
                self._release(entry.key)

    def _release(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._kept -= entry.nbytes
        self._free[entry.slot.size].append(entry.slot)

    def _open(self) -> None:
        """Find the slots of an earlier run, and in them the records that are sound."""
        slots = places(os.pread(self._places, os.fstat(self._places).st_size, 0))
        for slot in slots:
            self._end = slot.offset + slot.size
            # Take up what the header of a slot speaks of; whether it is true shows when it is read.
            entry = parse(memoryview(os.pread(self._file, HEADER_BYTES, slot.offset)), slot)
            if entry is None or entry.key in self._entries or entry.prefix != self._prefix(entry.depth):
                self._free[slot.size].append(slot)
            else:
                self._entries[entry.key] = entry
                self._kept += entry.nbytes
        # What follows the last slot that is known was allocated by nobody.
        os.ftruncate(self._places, len(slots) * PLACE_BYTES)
        os.lseek(self._places, 0, os.SEEK_END)
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)


def _write_all(file: int, data: bytes, offset: int | None) -> None:
    while data:
        done = os.write(file, data) if offset is None else os.pwrite(file, data, offset)
        data, offset = data[done:], None if offset is None else offset + done
