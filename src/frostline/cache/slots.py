"""The format of records in files: slots one after the other, and on disk an index that says where each begins.

    FOLDER/slots.bin   slots: a header of 128 bytes, the record, padding to 64 bytes
    FOLDER/slots.idx   where each slot begins and how large it is; appended before the slot is first written

Where several ranks share a folder each has a pair of its own (``slots-1.bin``...), into which it puts new slots.

A header carries whose record its slot holds, at which depth and under which weights, and a checksum over all of that
and the record: a slot that was torn by a kill, that rotted or that belongs to something else is a miss.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from frostline.cache.store import aligned

__all__ = [
    "DTYPES",
    "HEADER_BYTES",
    "NEWS_BYTES",
    "PLACE_BYTES",
    "Entry",
    "Slot",
    "file_numbers",
    "pack",
    "pack_news",
    "pack_place",
    "parse",
    "places",
    "read_slots",
    "slots_name",
    "unpack_news",
]

HEADER_BYTES = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)

_MAGIC = b"FROSTREC"
_FORMAT = 1
# magic, format, depth, dtype, dimensions, shape, bytes of the record, bytes of the slot, key, prefix; then two
# checksums, over header and record, and over the header alone (what a rotten header says is not looked at)
_FIELDS = struct.Struct("<8sHHHH4QQQ16s16s")
_CHECKSUMS = struct.Struct("<II")
_SAID = _FIELDS.size + _CHECKSUMS.size
_SIZE_FIELD = 10
_PLACE = struct.Struct("<QQI")  # offset, bytes, checksum of the two
PLACE_BYTES = _PLACE.size
_WHERE = struct.Struct("<IQ")  # file, offset
NEWS_BYTES = 128  # a line of a rank's log: where a slot is, and what its header says
_NAME = re.compile(r"slots(?:-(\d+))?\.idx")


@dataclass(frozen=True)
class Slot:
    """A place in a file of slots: where it begins, and its bytes. ``file``: number of the file."""

    offset: int
    size: int
    file: int


class Entry:
    """What a slot holds, as its header says it. One object for each time that a slot is written."""

    __slots__ = ("_alone", "_whole", "depth", "dtype", "key", "nbytes", "prefix", "said", "shape", "slot", "strides")

    def __init__(
        self, slot: Slot, depth: int, shape: tuple[int, ...], dtype: torch.dtype, key: bytes, prefix: bytes, said: bytes
    ) -> None:  # fmt: skip
        self.slot, self.depth, self.shape, self.dtype, self.key, self.prefix = slot, depth, shape, dtype, key, prefix
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self.said = said
        self._whole, self._alone = _CHECKSUMS.unpack_from(said, _FIELDS.size)

    def is_in(self, header: bytes | memoryview, record: memoryview) -> bool:
        """Whether the bytes of a slot are those that were written."""
        # Where the header is the one that was written, sample, depth and weights are right.
        return header[:_SAID] == self.said and zlib.crc32(record, self._alone) == self._whole


def pack(slot: Slot, key: bytes, depth: int, prefix: bytes, value: Tensor) -> tuple[Entry, bytes, memoryview]:
    """Entry, header (128 bytes) and bytes of a record that goes into ``slot``."""
    shape = (*value.shape, *([0] * (4 - value.dim())))
    fields = _FIELDS.pack(
        _MAGIC, _FORMAT, depth, DTYPES.index(value.dtype), value.dim(), *shape, value.nbytes, slot.size, key, prefix
    )
    payload: memoryview = value.view(torch.uint8).numpy().reshape(-1).data
    alone = zlib.crc32(fields)
    said = fields + _CHECKSUMS.pack(zlib.crc32(payload, alone), alone)
    entry = Entry(slot, depth, tuple(value.shape), value.dtype, key, prefix, said)
    return entry, said.ljust(HEADER_BYTES, b"\0"), payload


def parse(part: memoryview, slot: Slot) -> Entry | None:
    """What the header of ``slot`` speaks of; ``None`` where it is none, or damaged."""
    if len(part) < HEADER_BYTES or _CHECKSUMS.unpack_from(part, _FIELDS.size)[1] != zlib.crc32(part[: _FIELDS.size]):
        return None
    magic, form, depth, dtype, dims, *rest = _FIELDS.unpack_from(part)
    *shape, nbytes, size, key, prefix = rest
    if magic != _MAGIC or form != _FORMAT or dtype >= len(DTYPES) or dims > 4:
        return None
    entry = Entry(slot, depth, tuple(shape[:dims]), DTYPES[dtype], key, prefix, bytes(part[:_SAID]))
    if size != slot.size or size != HEADER_BYTES + aligned(nbytes) or nbytes != entry.nbytes:
        return None
    return entry


def pack_place(slot: Slot) -> bytes:
    """The line of the index for ``slot``."""
    return _PLACE.pack(slot.offset, slot.size, zlib.crc32(struct.pack("<QQ", slot.offset, slot.size)))


def pack_news(entry: Entry) -> bytes:
    """What a rank tells the others of a slot that it has written."""
    return (_WHERE.pack(entry.slot.file, entry.slot.offset) + entry.said).ljust(NEWS_BYTES, b"\0")


def unpack_news(lines: bytes) -> Iterator[Entry]:
    """What another rank has told (whole lines)."""
    for at in range(0, len(lines), NEWS_BYTES):
        said = memoryview(lines)[at + _WHERE.size : at + NEWS_BYTES].tobytes().ljust(HEADER_BYTES, b"\0")
        file, offset = _WHERE.unpack_from(lines, at)
        size = _FIELDS.unpack_from(said)[_SIZE_FIELD]
        if (entry := parse(memoryview(said), Slot(offset, size, file))) is not None:
            yield entry


def places(index: bytes, file: int) -> list[Slot]:
    """The slots that the index of a file names, up to its first line that is torn."""
    slots: list[Slot] = []
    end = 0
    for at in range(0, len(index) - _PLACE.size + 1, _PLACE.size):
        offset, size, checksum = _PLACE.unpack_from(index, at)
        if checksum != zlib.crc32(index[at : at + 16]) or offset != end or size <= HEADER_BYTES:
            break
        slots.append(Slot(offset, size, file))
        end = offset + size
    return slots


def slots_name(number: int) -> str:
    """The name of a file of slots; its index has the same with ``.idx``."""
    return f"slots-{number}.bin" if number else "slots.bin"


def file_numbers(folder: Path) -> list[int]:
    """The files of slots in ``folder`` that have an index."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1] or 0) for match in found if match)


def read_slots(folder: Path) -> Iterator[bool]:
    """Read every slot of ``folder`` and say whether it holds a sound record.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    for number in file_numbers(folder):
        data = folder / slots_name(number)
        with data.open("rb") as file:
            for slot in places(data.with_suffix(".idx").read_bytes(), number):
                file.seek(slot.offset)
                part = memoryview(file.read(slot.size))
                entry = parse(part, slot)  # the last slot may lack its padding
                yield entry is not None and entry.is_in(part, part[HEADER_BYTES : HEADER_BYTES + entry.nbytes])
