"""Records on disk: slots in one file, read by positional reads from several threads, written by one in the background.

    FOLDER/slots.bin   slots one after the other: a header of 128 bytes, the record, padding to 64 bytes
    FOLDER/slots.idx   where each slot begins and how large it is; appended before the slot is first written

A slot is written over in place when its record is upgraded. Its header carries whose record it holds, at which depth
and under which weights, and a checksum over all of that and the record: a slot that was torn by a kill, that rotted
or that belongs to something else is a miss. Eleven libraries were measured to be 1.1 to 25 times slower at cold random
reads than positional reads from a flat file, so this is our own.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import queue
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from frostline.cache.store import Record, aligned

__all__ = ["DiskStore", "read_slots"]

logger = logging.getLogger("frostline")

_MAGIC = b"FROSTREC"
_FORMAT = 1
# magic, format, depth, dtype, dimensions, shape, bytes of the record, bytes of the slot, key, prefix; then two
# checksums, over header and record, and over the header alone (what a rotten header says is not looked at)
_HEADER = struct.Struct("<8sHHHH4QQQ16s16s")
_CHECKSUMS = struct.Struct("<II")
_HEADER_BYTES = 128
_PLACE = struct.Struct("<QQI")  # offset, bytes, checksum of the two
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class _Slot:
    offset: int
    size: int


@dataclass(frozen=True)
class _Entry:
    slot: _Slot
    depth: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    header: bytes


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
        self._prefix, self._queued, self._keep = prefix, queued, keep
        self._file = os.open(self.folder / "slots.bin", os.O_RDWR | os.O_CREAT, 0o600)
        self._places = os.open(self.folder / "slots.idx", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._places, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            os.close(self._places)
            raise
        self._entries: dict[bytes, _Entry] = {}
        self._free: defaultdict[int, list[_Slot]] = defaultdict(list)
        self._end = 0
        self._kept = 0
        self._waiting = 0
        self._lock = threading.Lock()
        self._threads = threads
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="frostline-read")
        self._queue: queue.Queue[tuple[bytes, int, Tensor] | None] = queue.Queue()
        self._full = False
        self.torn = self.lost = 0
        self._open()
        self._writer = threading.Thread(target=self._write_on, name="frostline-write", daemon=True)
        self._writer.start()

    # -- Store -----------------------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return self._kept

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        """Read records side by side into one buffer. One that does not match its checksum is forgotten."""
        with self._lock:
            wanted = [self._entries.get(key) for key in keys]
        spans, total = [], 0
        for entry in wanted:
            spans.append(total)
            total += _HEADER_BYTES + aligned(entry.nbytes) if entry is not None else 0
        if not total:
            return [None] * len(keys)
        buffer = torch.empty(total, dtype=torch.uint8)
        view = buffer.numpy().data

        records: list[Record | None] = [None] * len(keys)

        def read(places: Sequence[int]) -> None:
            for place in places:
                entry, start = wanted[place], spans[place]
                assert entry is not None
                part = view[start : start + _HEADER_BYTES + entry.nbytes]
                if self._read(part, keys[place], entry):
                    value = buffer[start + _HEADER_BYTES : start + len(part)].view(entry.dtype).view(entry.shape)
                    records[place] = Record(entry.depth, value)

        # In the order of the file, dealt out to the readers.
        found = sorted((p for p, e in enumerate(wanted) if e is not None), key=lambda p: wanted[p].slot.offset)  # type: ignore[union-attr]
        hands = min(self._threads, len(found))
        list(self._readers.map(read, [found[hand::hands] for hand in range(hands)]))
        return records

    def holds(self, key: bytes) -> bool:
        return key in self._entries

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        if self._full or value.dtype not in _DTYPES or value.dim() > 4:
            return False
        with self._lock:
            if self._waiting and self._waiting + value.nbytes > self._queued:
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

    def close(self) -> None:
        """Stop reading and writing. Without ``keep`` the records are user data that nobody asked to be kept: gone."""
        if not self._writer.is_alive():
            return
        self._queue.put(None)
        self._writer.join()
        self._readers.shutdown()
        os.close(self._file)
        os.close(self._places)
        if not self._keep:
            for name in ("slots.bin", "slots.idx", "manifest.json"):
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):  # not empty: somebody else's files
                self.folder.rmdir()

    # -- writing ---------------------------------------------------------------------------------------------

    def _write_on(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                # A full disk costs further records, never the run; what is there stays readable.
                self._full = True
                self.lost += 1
                logger.warning("no more boundary activations are written to %s: %s", self.folder, error)
            finally:
                with self._lock:
                    self._waiting -= item[2].nbytes
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, key: bytes, depth: int, value: Tensor) -> None:
        size = _HEADER_BYTES + aligned(value.nbytes)
        with self._lock:
            # While it is written over, a slot holds no record.
            old = self._entries.pop(key, None)
            if old is not None:
                self._kept -= old.nbytes
                self._free[old.slot.size].append(old.slot)
            slot = self._free[size].pop() if self._free[size] else None
            if slot is None and self._end + size > self.budget:
                self.lost += 1
                return
        if slot is None:
            slot = _Slot(self._end, size)
            place = struct.pack("<QQ", slot.offset, slot.size)
            _write_all(self._places, _PLACE.pack(slot.offset, slot.size, zlib.crc32(place)), None)
            self._end += size
        shape = (*value.shape, *([0] * (4 - value.dim())))
        header = _HEADER.pack(
            _MAGIC, _FORMAT, depth, _DTYPES.index(value.dtype), value.dim(), *shape, value.nbytes, size, key,
            self._prefix(depth),
        )  # fmt: skip
        payload = value.view(torch.uint8).numpy().reshape(-1).data
        alone = zlib.crc32(header)
        whole = (header + _CHECKSUMS.pack(zlib.crc32(payload, alone), alone)).ljust(_HEADER_BYTES, b"\0")
        written = os.pwritev(self._file, [whole, payload], slot.offset)
        if written != len(whole) + value.nbytes:
            _write_all(self._file, (whole + bytes(payload))[written:], slot.offset + written)
        with self._lock:
            self._entries[key] = _Entry(slot, depth, tuple(value.shape), value.dtype, value.nbytes, header)
            self._kept += value.nbytes

    # -- reading ---------------------------------------------------------------------------------------------

    def _read(self, part: memoryview, key: bytes, entry: _Entry) -> bool:
        """Fill ``part`` with a slot's header and record, and say whether they are what ``entry`` says."""
        try:
            whole = os.preadv(self._file, [part], entry.slot.offset) == len(part)
        except OSError:
            whole = False
        # The header names the sample, the depth and the weights: where it is the one that was written, they are right.
        if whole and part[: _HEADER.size] == entry.header and _is_whole(part):
            return True
        self._forget(key, entry)
        return False

    def _forget(self, key: bytes, entry: _Entry) -> None:
        with self._lock:
            # The writer may have put a new record there meanwhile; then nothing was torn.
            if self._entries.get(key) is entry:
                self.torn += 1
                self._release(key)

    def _release(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._kept -= entry.nbytes
        self._free[entry.slot.size].append(entry.slot)

    def _open(self) -> None:
        """Find the slots of an earlier run, and in them the records that are sound."""
        slots = _slots(os.pread(self._places, os.fstat(self._places).st_size, 0))
        for slot in slots:
            self._end = slot.offset + slot.size
            self._adopt(slot)
        # What follows the last slot that is known was allocated by nobody.
        os.ftruncate(self._places, len(slots) * _PLACE.size)
        os.lseek(self._places, 0, os.SEEK_END)
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)

    def _adopt(self, slot: _Slot) -> None:
        """Take up what the header of a slot speaks of; whether it is true shows when it is read."""
        part = memoryview(os.pread(self._file, _HEADER_BYTES, slot.offset))
        found = _parse(part, slot) if len(part) == _HEADER_BYTES else None
        if found is not None:
            key, prefix, entry = found
            if key not in self._entries and prefix == self._prefix(entry.depth):
                self._entries[key] = entry
                self._kept += entry.nbytes
                return
        self._free[slot.size].append(slot)


def read_slots(folder: Path) -> Iterator[bool]:
    """Read every slot of ``folder`` and say whether it holds a sound record.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    with (folder / "slots.bin").open("rb") as file:
        for slot in _slots((folder / "slots.idx").read_bytes()):
            file.seek(slot.offset)
            part = memoryview(file.read(slot.size))
            found = _parse(part, slot) if len(part) >= _HEADER_BYTES else None  # the last slot may lack its padding
            yield found is not None and _is_whole(part[: _HEADER_BYTES + found[2].nbytes])


def _slots(places: bytes) -> list[_Slot]:
    """The slots that an index names, up to its first line that is torn."""
    slots: list[_Slot] = []
    end = 0
    for at in range(0, len(places) - _PLACE.size + 1, _PLACE.size):
        offset, size, checksum = _PLACE.unpack_from(places, at)
        if checksum != zlib.crc32(places[at : at + 16]) or offset != end or size <= _HEADER_BYTES:
            break
        slots.append(_Slot(offset, size))
        end = offset + size
    return slots


def _is_whole(part: memoryview) -> bool:
    """Whether a header and the record behind it match their checksum."""
    whole, alone = _CHECKSUMS.unpack_from(part, _HEADER.size)
    return bool(alone == zlib.crc32(part[: _HEADER.size]) and whole == zlib.crc32(part[_HEADER_BYTES:], alone))


def _parse(part: memoryview, slot: _Slot) -> tuple[bytes, bytes, _Entry] | None:
    """Key, prefix and entry that the header of ``slot`` speaks of; ``None`` where it is none."""
    if _CHECKSUMS.unpack_from(part, _HEADER.size)[1] != zlib.crc32(part[: _HEADER.size]):
        return None
    magic, form, depth, dtype, dims, *rest = _HEADER.unpack_from(part)
    *shape, nbytes, size, key, prefix = rest
    if magic != _MAGIC or form != _FORMAT or dtype >= len(_DTYPES) or dims > 4:
        return None
    entry = _Entry(slot, depth, tuple(shape[:dims]), _DTYPES[dtype], nbytes, bytes(part[: _HEADER.size]))
    if size != slot.size or size != _HEADER_BYTES + aligned(nbytes) or nbytes != _nbytes(entry):
        return None
    return key, prefix, entry


def _nbytes(entry: _Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _write_all(file: int, data: bytes, offset: int | None) -> None:
    while data:
        done = os.write(file, data) if offset is None else os.pwrite(file, data, offset)
        data, offset = data[done:], None if offset is None else offset + done
