"""The formats' work on a GPU, each way in one kernel: values are read once and written once.

Operation by operation, packing would read and write a saved tensor some ten times. The parts are those of the formats
themselves (:mod:`frostline.memory.formats`, :mod:`frostline.memory.codebook`), so either may read what the other has
written. Triton comes with torch's builds for GPUs; without it the formats do their work in torch's own operations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for processors
    triton = None

__all__ = [
    "GROUP",
    "PLACES",
    "pack_bits",
    "pack_book",
    "pack_rows",
    "unpack_bits",
    "unpack_book",
    "unpack_rows",
    "usable",
]

# Values in a row: neighbours in memory that share a scale.
GROUP = 128
# Places in the table of a code book: so many that an input lands on the wrong side of a border only where both levels
# are as near as can be.
PLACES = 1 << 14
# Rows, and bytes of bits, that one program works on.
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 32, 512


def usable(tensor: Tensor) -> bool:
    """Whether kernels can work on ``tensor``: Triton's work on Nvidia's GPUs that have bfloat16."""
    if triton is None or torch.version.hip is not None or not tensor.is_cuda or tensor.numel() == 0:
        return False
    return _has_bfloat16(tensor.device)


def pack_rows(values: Tensor, width: int, top: float, zero: float) -> tuple[Tensor, Tensor]:
    """Codes ``[r, 128]`` (of 4 bits ``[r, 64]``) and scales ``[r, 1]`` for ``n`` ``values``, as ``Rows`` has them."""
    count = values.numel()
    rows = _parts(count, GROUP)
    codes = torch.empty(rows, GROUP * width // 8, dtype=torch.uint8, device=values.device)
    scales = torch.empty(rows, 1, dtype=torch.bfloat16, device=values.device)
    kernel = _pack_fours if width == 4 else _pack_eights
    _launch(kernel, _parts(rows, _ROWS_AT_ONCE), count, values, codes, scales, rows, top, zero)
    return codes, scales


def unpack_rows(codes: Tensor, scales: Tensor, width: int, zero: float, count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` values of ``dtype`` for what :func:`pack_rows` gave."""
    values = torch.empty(count, dtype=dtype, device=codes.device)
    rows = codes.shape[0]
    kernel = _unpack_fours if width == 4 else _unpack_eights
    _launch(kernel, _parts(rows, _ROWS_AT_ONCE), count, values, codes, scales, rows, zero)
    return values


def pack_book(values: Tensor, table: Tensor, steps: float) -> Tensor:
    """Codes of 4 bits ``[r, 64]`` for ``n`` ``values``: those of ``table`` ``[PLACES]``, ``steps`` places to 1."""
    count = values.numel()
    rows = _parts(count, GROUP)
    codes = torch.empty(rows, GROUP // 2, dtype=torch.uint8, device=values.device)
    _launch(_pack_book, _parts(rows, _ROWS_AT_ONCE), count, values, codes, table, rows, steps)
    return codes


def unpack_book(codes: Tensor, levels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` values of ``dtype``: the one of ``levels`` ``[16]`` for each code that :func:`pack_book` gave."""
    values = torch.empty(count, dtype=dtype, device=codes.device)
    rows = codes.shape[0]
    _launch(_unpack_book, _parts(rows, _ROWS_AT_ONCE), count, values, codes, levels, rows)
    return values


def pack_bits(values: Tensor) -> Tensor:
    """Bytes ``[ceil(n / 8)]`` that say which of ``n`` ``values`` are not zero, the lowest bit first."""
    count = values.numel()
    packed = torch.empty(_parts(count, 8), dtype=torch.uint8, device=values.device)
    flags = values.view(torch.uint8) if values.dtype == torch.bool else values
    _launch(_pack_bits, _parts(count, 8 * _BYTES_AT_ONCE), count, flags, packed)
    return packed


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` values of ``dtype``, 1 (true) or 0, for bytes that :func:`pack_bits` gave."""
    values = torch.empty(count, dtype=dtype, device=packed.device)
    flags = values.view(torch.uint8) if dtype == torch.bool else values
    _launch(_unpack_bits, _parts(count, 8 * _BYTES_AT_ONCE), count, flags, packed)
    return values


@functools.lru_cache(maxsize=32)
def _has_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _parts(count: int, size: int) -> int:
    return -(-count // size)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, programs: int, count: int, values: Tensor, *others: Any) -> None:
    """Run ``kernel`` on ``count`` ``values`` and what else it is given.

    Triton looks at every argument of every call, and asks the driver about every tensor, which takes longer than most
    of these kernels run. What it compiles hangs on nothing here but the type of ``values``, whether they lie at a
    multiple of 16 bytes (the rest is made by the allocator, or does), and whether there are a multiple of 16 (then each
    thread reads several at a time), so it is asked once for each; after that it is given plain addresses.
    """
    device = values.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, programs, count, values, *others)
    address = values.data_ptr()
    key = (id(kernel), device, values.dtype, address % 16, count % 16 == 0, count == 1, count >> 31)
    known = _compiled.get(key)
    if known is None:
        _compiled[key] = kernel[programs, 1, 1](count, values, *others)
    else:
        given = [other.data_ptr() if isinstance(other, Tensor) else other for other in others]
        stream = torch._C._cuda_getCurrentRawStream(device)
        known.run(
            programs, 1, 1, stream, known.function, known.packed_metadata, None, None, None, count, address, *given
        )
    return None


if triton is not None:
    # No kernel has an argument of Triton's own kind (``tl.constexpr``), so that what is compiled takes the arguments
    # that the kernel takes. A row is worked on as two halves of 64, which codes of 4 bits put side by side in a byte.
    _ROWS, _BYTES = tl.constexpr(_ROWS_AT_ONCE), tl.constexpr(_BYTES_AT_ONCE)
    _MIDDLE, _LAST = tl.constexpr(PLACES / 2), tl.constexpr(PLACES - 1)

    # Compiled once for all numbers of rows.
    _kernel = functools.partial(triton.jit, do_not_specialize=["rows"])

    @triton.jit
    def _places():
        """Numbers of this program's rows ``[rows, 1]``, and of the places in half a row ``[1, 64]``."""
        return (tl.program_id(0).to(tl.int64) * _ROWS + tl.arange(0, _ROWS))[:, None], tl.arange(0, 64)[None, :]

    @triton.jit
    def _read(values, row, place, count):
        at = row * 128 + place
        low = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
        high = tl.load(values + at + 64, mask=at + 64 < count, other=0.0).to(tl.float32)
        return low, high

    @triton.jit
    def _write(values, row, place, count, low, high):
        at = row * 128 + place
        tl.store(values + at, low.to(values.dtype.element_ty), mask=at < count)
        tl.store(values + at + 64, high.to(values.dtype.element_ty), mask=at + 64 < count)

    @triton.jit
    def _write_codes(codes, row, place, rows, low, high, FOUR: tl.constexpr):
        if FOUR:
            at = row * 64 + place
            tl.store(codes + at, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=row < rows)
        else:
            at = row * 128 + place
            tl.store(codes + at, (low & 255).to(tl.uint8), mask=row < rows)
            tl.store(codes + at + 64, (high & 255).to(tl.uint8), mask=row < rows)

    @triton.jit
    def _read_codes(codes, row, place, rows, FOUR: tl.constexpr):
        if FOUR:
            both = tl.load(codes + row * 64 + place, mask=row < rows, other=0).to(tl.int32)
            low, high = both & 15, both >> 4
        else:
            at = row * 128 + place
            low = tl.load(codes + at, mask=row < rows, other=0).to(tl.int32)
            high = tl.load(codes + at + 64, mask=row < rows, other=0).to(tl.int32)
        return low, high

    @triton.jit
    def _rounded(values, zero):
        """As ``formats.rounded``: the sum of a small number and 3 * 2 ** 22 has no room for digits after the point."""
        return (values + (12582912.0 + zero)).to(tl.int32, bitcast=True)

    @triton.jit
    def _nearest_bfloat16(values):
        """As torch rounds, whatever ``to`` does here: a scale that were cut off would let its row run over."""
        bits = values.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(values == values, near, values)  # a processor's own "not a number" has all bits set

    @triton.jit
    def _pack_rows(values, codes, scales, count, rows, top, zero, FOUR: tl.constexpr):
        row, place = _places()
        low, high = _read(values, row, place, count)
        # As whole numbers, sizes keep their order, and what is not a number is the largest of all.
        sizes = tl.maximum(low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.max(sizes, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        by = _nearest_bfloat16(largest / top)
        tl.store(scales + row, by.to(tl.bfloat16), mask=row < rows)
        share = 1.0 / tl.where(by < 1.1754943508222875e-38, 1.1754943508222875e-38, by)
        _write_codes(codes, row, place, rows, _rounded(low * share, zero), _rounded(high * share, zero), FOUR)

    @_kernel()
    def _pack_eights(count, values, codes, scales, rows, top, zero):
        _pack_rows(values, codes, scales, count, rows, top, zero, False)

    @_kernel()
    def _pack_fours(count, values, codes, scales, rows, top, zero):
        _pack_rows(values, codes, scales, count, rows, top, zero, True)

    @triton.jit
    def _unpack_rows(values, codes, scales, count, rows, zero, FOUR: tl.constexpr):
        row, place = _places()
        low, high = _read_codes(codes, row, place, rows, FOUR)
        scale = tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)
        _write(values, row, place, count, (low.to(tl.float32) - zero) * scale, (high.to(tl.float32) - zero) * scale)

    @_kernel()
    def _unpack_eights(count, values, codes, scales, rows, zero):
        _unpack_rows(values, codes, scales, count, rows, zero, False)

    @_kernel()
    def _unpack_fours(count, values, codes, scales, rows, zero):
        _unpack_rows(values, codes, scales, count, rows, zero, True)

    @triton.jit
    def _code(values, table, steps):
        """The code at the place of each value; the mask keeps what is not a number inside of the table."""
        places = tl.minimum(tl.maximum(values * steps, -_MIDDLE), _MIDDLE - 1.0)
        return tl.load(table + (_rounded(places, _MIDDLE) & _LAST)).to(tl.int32)

    @_kernel()
    def _pack_book(count, values, codes, table, rows, steps):
        row, place = _places()
        low, high = _read(values, row, place, count)
        low, high = _code(low, table, steps), _code(high, table, steps)
        _write_codes(codes, row, place, rows, low, high, True)

    @_kernel()
    def _unpack_book(count, values, codes, levels, rows):
        row, place = _places()
        low, high = _read_codes(codes, row, place, rows, True)
        _write(values, row, place, count, tl.load(levels + low), tl.load(levels + high))

    @triton.jit
    def _bits():
        """Numbers of this program's bytes ``[bytes, 1]``, and of the bits in one ``[1, 8]``."""
        return (tl.program_id(0).to(tl.int64) * _BYTES + tl.arange(0, _BYTES))[:, None], tl.arange(0, 8)[None, :]

    @_kernel()
    def _pack_bits(count, values, packed):
        byte, bit = _bits()
        at = byte * 8 + bit
        true = (tl.load(values + at, mask=at < count, other=0) != 0).to(tl.int32)
        tl.store(packed + byte, tl.sum(true << bit, axis=1, keep_dims=True).to(tl.uint8), mask=byte * 8 < count)

    @_kernel()
    def _unpack_bits(count, values, packed):
        byte, bit = _bits()
        at = byte * 8 + bit
        true = (tl.load(packed + byte, mask=byte * 8 < count, other=0).to(tl.int32) >> bit) & 1
        tl.store(values + at, true.to(values.dtype.element_ty), mask=at < count)
