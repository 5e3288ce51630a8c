"""Records in slots of files: read by positional reads from several threads, written by one in the background.

Several ranks of a machine may share them: each puts new records into a file of its own, reads those of all, and writes
an upgrade over its slot, whoever's file that is in. What a rank has written it tells the others in a log that they
read on. Views may be apart for a moment; a slot that does not hold what a view says is a miss, never a wrong record.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from frostline.cache.files import SlotFile, write_all
from frostline.cache.ranks import Circle
from frostline.cache.reading import Reader
from frostline.cache.slots import DTYPES, HEADER_BYTES, NEWS_BYTES, Entry, Slot, pack, pack_news, unpack_news
from frostline.cache.store import HOST, Record, aligned

__all__ = ["SlotStore"]

logger = logging.getLogger("frostline")

# Bytes that may be read before they are asked for; where more are announced, the oldest batch is given up.
_AHEAD = 256 << 20
# Bytes of another rank's log that are read at a time.
_NEWS = NEWS_BYTES << 12
# Bytes that one thread reads ahead: it has a step's time for it, and more threads would take the step's processors.
_A_HAND = 1 << 20
_MANY = _ANY_DEPTH = 1 << 30


class _Waiting(NamedTuple):
    """A record that is to be written."""

    slot: Slot
    key: bytes
    depth: int
    value: Tensor


class SlotStore:
    """A :class:`~frostline.cache.store.Store` in files of slots.

    Args:
        files: those into which this process puts new records, the first of them; what is in them is found again.
        budget: bytes at most of these files.
        prefix: hash (16 bytes) of the weights below a depth; a record under other weights is not used.
        threads: readers at a time.
        queued: bytes that may wait to be written; where they are all taken, a record is skipped rather than waited for.
            With 0 a record is written by who puts it.
        where: what to call the place in a message.
        circle: the ranks with which records are shared.
    """

    reads_ahead = True
    device = HOST

    def __init__(
        self, files: Sequence[SlotFile], budget: int, *, prefix: Callable[[int], bytes], threads: int = 8,
        queued: int = 64 << 20, where: str, circle: Circle | None = None,
    ) -> None:  # fmt: skip
        self.budget, self.queued, self.where = budget, queued, where
        self._prefix, self._reader = prefix, Reader(threads)
        self._own = {file.number: file for file in files}
        self._data = {file.number: file.data for file in files}  # of other ranks, too
        self._entries: dict[bytes, Entry] = {}
        self._pending: dict[bytes, _Waiting] = {}
        self._kept = self._waiting = 0
        self._line = _ANY_DEPTH
        self._closed = False
        self._lock = threading.RLock()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="frostline-ahead")
        self._coming: dict[bytes, tuple[Entry, Future[dict[bytes, Record]]]] = {}
        self._announced: OrderedDict[Future[dict[bytes, Record]], int] = OrderedDict()  # bytes not asked for yet
        self._queue: queue.Queue[_Waiting | None] = queue.Queue()
        self.failure: str | None = None
        self.torn = self.lost = self.skipped = 0
        for file in files:
            for slot, entry in file.find():
                if entry is not None and entry.key not in self._entries and entry.prefix == prefix(entry.depth):
                    file.claim(slot, entry.key)
                    self._take_up(entry)
        self._circle, self._log = circle, -1
        self._logs: dict[int, int] = {}  # open logs of other ranks, and how far they have been read
        self._later: list[Entry] = []  # told of, and not to be used yet
        if circle is not None:
            self._log = os.memfd_create("frostline-news")
            for entry in self._entries.values():
                write_all(self._log, pack_news(entry), None)
            circle.introduce(self._log, self._data)
        self._writer = threading.Thread(target=self._write_on, name="frostline-write", daemon=True)
        self._writer.start()

    # -- Store -----------------------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        """How many are there, or about to be."""
        with self._lock:
            return len(self._entries) + sum(key not in self._entries for key in self._pending)

    @property
    def nbytes(self) -> int:
        return self._kept

    def expect(self, keys: Sequence[bytes]) -> None:
        """Records that will be asked for soon: they are read meanwhile, off this thread."""
        with self._lock:
            self._hear()
            wanted = {k: e for k in keys if k not in self._coming and (e := self._entries.get(k)) is not None}
            size = sum(entry.nbytes for entry in wanted.values())
            # What nobody has asked for in so long was announced in vain.
            while self._announced and sum(self._announced.values()) + size > _AHEAD:
                given_up, _ = self._announced.popitem(last=False)
                given_up.cancel()
                self._coming = {k: (e, found) for k, (e, found) in self._coming.items() if found is not given_up}
            if wanted and size <= _AHEAD:
                found = self._ahead.submit(self._fetch, wanted, 1 + size // _A_HAND)
                self._announced[found] = size
                self._coming.update((key, (entry, found)) for key, entry in wanted.items())

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        """Records that have been read ahead, and the others now. A damaged one is forgotten."""
        wanted: dict[bytes, Entry] = {}
        coming: dict[bytes, Future[dict[bytes, Record]]] = {}
        with self._lock:
            self._hear()
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
        return key in self._entries or key in self._pending

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        if self.failure is not None or value.dtype not in DTYPES or value.dim() > 4 or not value.nbytes:
            return False
        with self._lock:
            if self.queued and self._waiting and self._waiting + value.nbytes > self.queued:
                self.skipped += 1
                return False
            slot = self._slot_for(key, HEADER_BYTES + aligned(value.nbytes))
            if slot is None:
                return False
            own = value.contiguous().clone() if self.queued else value.contiguous()
            item = self._pending[key] = _Waiting(slot, key, depth, own)
            self._waiting += value.nbytes
        if self.queued:
            self._queue.put(item)
            return True
        self._attempt(item)
        return self.failure is None

    def drop(self, key: bytes) -> None:
        with self._lock:
            if key in self._entries:
                self._release(key)

    def depths(self) -> set[int]:
        with self._lock:
            return {e.depth for e in self._entries.values()} | {item.depth for item in self._pending.values()}

    def moved(self, depth: int) -> int:
        before = self._line
        if depth < before:
            self.flush()
        with self._lock:
            self._line = depth
            self._hear(again=True)
            if depth < before < _ANY_DEPTH:  # a thaw, not the first word of where the line is
                self._later.clear()
            deeper = [key for key, entry in self._entries.items() if entry.depth > depth]
            for key in deeper:
                self._release(key)
        return len(deeper)

    def clear(self) -> None:
        self.flush()
        with self._lock:
            self._later.clear()
            self._entries.clear()
            self._kept = 0
            for file in self._own.values():
                file.clear()

    def flush(self) -> None:
        """Wait until everything that was put is written."""
        self._queue.join()

    def cool(self) -> None:
        """Write everything out, so that what is read next comes from where the records are."""
        self.flush()

    def close(self) -> None:
        """Stop reading and writing."""
        if self._closed:
            return
        self._closed = True
        if self._circle is not None:
            self._circle.leave()
        self._queue.put(None)
        self._writer.join()
        self._ahead.shutdown()
        self._reader.close()
        self._coming.clear()
        for number in self._data.keys() - self._own.keys():
            os.close(self._data[number])
        for log in (*self._logs, *([self._log] if self._log >= 0 else [])):
            os.close(log)
        for file in self._own.values():
            file.close()

    # -- writing ---------------------------------------------------------------------------------------------

    def _slot_for(self, key: bytes, size: int) -> Slot | None:
        """Where a record goes: over the sample's earlier one if it has the same size."""
        entry = self._entries.get(key)
        pending = self._pending.get(key)
        held = pending.slot if pending is not None else entry.slot if entry is not None else None
        if held is not None and held.size == size:
            return held
        for file in self._own.values():
            if (slot := file.reuse(size, key)) is not None:
                return slot
        if sum(file.end for file in self._own.values()) + size > self.budget:
            return None
        return next(iter(self._own.values())).append(size, key)

    def _write_on(self) -> None:
        while (item := self._queue.get()) is not None:
            self._attempt(item)
            self._queue.task_done()
        self._queue.task_done()

    def _attempt(self, item: _Waiting) -> None:
        try:
            self._write(item)
        except Exception as error:
            # A full disk, or weights that cannot be hashed, costs further records, never the run.
            self.failure = f"{self.where}: {error}"
            self.lost += 1
            logger.debug("writing failed", exc_info=True)
        finally:
            with self._lock:
                self._waiting -= item.value.nbytes
                if self._pending.get(item.key) is item:
                    del self._pending[item.key]

    def _write(self, item: _Waiting) -> None:
        slot, key = item.slot, item.key
        with self._lock:
            # While it is written over, a slot holds no record.
            if key in self._entries:
                self._release(key, kept=slot)
        if slot.file in self._own:
            self._own[slot.file].named(slot)
        entry, header, payload = pack(slot, key, item.depth, self._prefix(item.depth), item.value)
        written = os.pwritev(self._data[slot.file], [header, payload], slot.offset)
        if written != len(header) + entry.nbytes:
            write_all(self._data[slot.file], (header + bytes(payload))[written:], slot.offset + written)
        with self._lock:
            if key in self._entries:  # another rank has told of it meanwhile
                self._release(key, kept=slot)
            self._take_up(entry)
        if self._log >= 0:
            write_all(self._log, pack_news(entry), None)

    def _take_up(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self._kept += entry.nbytes

    def _release(self, key: bytes, kept: Slot | None = None) -> None:
        """Forget a record. Its slot is free then, unless it is ``kept``, about to be written, or not ours to give."""
        entry = self._entries.pop(key)
        self._kept -= entry.nbytes
        pending = self._pending.get(key)
        reserved = kept if pending is None else pending.slot
        if entry.slot not in (kept, reserved) and entry.slot.file in self._own:
            self._own[entry.slot.file].release(entry.slot, key)

    # -- reading ---------------------------------------------------------------------------------------------

    def _fetch(self, wanted: dict[bytes, Entry], hands: int = _MANY) -> dict[bytes, Record]:
        """Read records; a damaged one is forgotten."""
        found, unsound = self._reader.read(wanted.values(), self._data, hands)
        for entry in unsound:
            self._forget(entry)
        return found

    def _forget(self, entry: Entry) -> None:
        with self._lock:
            self._hear()
            # Somebody may have put a new record there meanwhile; then nothing was torn.
            if self._entries.get(entry.key) is entry:
                self.torn += 1
                self._release(entry.key)

    # -- other ranks -----------------------------------------------------------------------------------------

    def _hear(self, *, again: bool = False) -> None:
        """Take over what other ranks have written since the last time; ``again``: and what could not be used then."""
        if self._circle is None:
            return
        try:
            newcomers = self._circle.newcomers()
            for log, files in newcomers:
                self._logs[log] = 0
                self._data.update(files)
            told: list[Entry] = []
            if newcomers or again:
                told, self._later = self._later, []
            for log in self._logs:
                told.extend(self._told(log))
            for entry in told:
                self._hear_of(entry)
        except Exception as error:  # who held what the ranks say to each other may have ended before the others
            self._circle.lost(error)
            self._circle = None

    def _told(self, log: int) -> Iterator[Entry]:
        while lines := os.pread(log, _NEWS, self._logs[log]):
            whole = len(lines) - len(lines) % NEWS_BYTES
            self._logs[log] += whole
            yield from unpack_news(lines[:whole])
            if len(lines) < _NEWS:
                return

    def _hear_of(self, entry: Entry) -> None:
        if entry.depth > self._line or entry.slot.file not in self._data:
            # That rank is a step ahead, or has written into a slot of one that is not known yet.
            self._later.append(entry)
            return
        old = self._entries.get(entry.key)
        # Two ranks may come by the same sample (samplers fill up the last batch): the same one wins on both.
        if old is not None and _precedence(old) > _precedence(entry):
            return
        if entry.prefix != self._prefix(entry.depth):  # from before a thaw
            return
        file = self._own.get(entry.slot.file)
        if file is not None and not file.claim(entry.slot, entry.key):  # given to another sample meanwhile
            return
        if old is not None:
            self._release(entry.key, kept=entry.slot)
        self._take_up(entry)


def _precedence(entry: Entry) -> tuple[int, int]:
    return entry.depth, -entry.slot.file
