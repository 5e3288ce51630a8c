"""Formats: how the values of a tensor that autograd saves are kept until the backward pass.

A format takes the values of a tensor as one line, in the order in which they lie in memory, and gives back a few small
tensors, its *parts*. It knows nothing of shapes, operations or autograd. Values are worked on in chunks, so
that packing never needs a second full copy of them, and never changed in place. On a GPU the formats of ours are
kernels (:mod:`frostline.memory.kernels`).

Sources: SlimFit (arXiv 2305.18513) has fixed point and pruning; integers with a scale for each row are the usual
absmax quantisation. The code book over the derivative is ours (:mod:`frostline.memory.codebook`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from frostline.memory import kernels
from frostline.memory.bits import pack_bits, unpack_bits, values_at_a_time
from frostline.memory.kernels import GROUP

__all__ = [
    "Bits",
    "ByRow",
    "Content",
    "FixedPoint",
    "Format",
    "Noise",
    "Packed",
    "Product",
    "Pruned",
    "Rows",
    "Sides",
    "rounded",
]

_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = float(3 << 22)


class Format(ABC):
    """A way of keeping values. Formats are small constants that compare by what they do."""

    @abstractmethod
    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        """Parts for ``values``, ``n`` in a contiguous tensor of any shape; they share no memory with them."""

    @abstractmethod
    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        """``[count]`` values of ``dtype`` for parts that :meth:`pack` gave."""


class Content(ABC):
    """Values that can be had back, as often as asked."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are kept for this content alone."""

    @abstractmethod
    def restore(self) -> Tensor:
        """The values ``[n]``, in memory of their own."""


class Packed(Content):
    """Values, ``n`` in a contiguous tensor of any shape, kept in a format."""

    __slots__ = ("count", "dtype", "format", "parts")

    def __init__(self, how: Format, values: Tensor) -> None:
        self.format, self.count, self.dtype = how, values.numel(), values.dtype
        self.parts = how.pack(values)

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    def restore(self) -> Tensor:
        return self.format.unpack(self.parts, self.count, self.dtype)


class Product(Content):
    """What dropout made of values that are kept anyway: it needs no room of its own.

    Args:
        values: what dropout was given.
        mask: what it multiplied by: the noise, or (fused kernels) booleans.
        scale: by which kept values were multiplied, where the mask is booleans.
    """

    __slots__ = ("mask", "scale", "values")

    def __init__(self, values: Content, mask: Content, scale: float) -> None:
        self.values, self.mask, self.scale = values, mask, scale

    @property
    def nbytes(self) -> int:
        return 0

    def restore(self) -> Tensor:
        mask = self.mask.restore()
        values = self.values.restore().mul_(mask)
        return values.mul_(self.scale) if mask.dtype == torch.bool else values


class ByRow(Format):
    """Codes for rows of 128 values. A subclass says what the codes of some rows are."""

    code: ClassVar[torch.dtype] = torch.uint8
    scaled: ClassVar[bool] = False

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code, 8 or 4; two codes of 4 bits share a byte."""

    @abstractmethod
    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes ``[r, 128]`` (and scales ``[r, 1]``) for fp32 values ``[r, 128]``, which stay as they are."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor | None, into: Tensor) -> None:
        """Write the values ``[r, 128]`` of ``codes``, in the precision of ``into``."""

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        count, device = -(-values.numel() // GROUP), values.device
        codes = torch.empty(count, GROUP * self.bits // 8, dtype=self.code, device=device)
        scales = torch.empty(count, 1, dtype=torch.bfloat16, device=device) if self.scaled else None
        for first, rows in _rows(values.view(-1)):
            part = slice(first, first + rows.shape[0])
            found, by = self.encode(rows)
            codes[part] = found if self.bits == 8 else _two_in_a_byte(found)
            if scales is not None and by is not None:
                scales[part] = by
        return (codes,) if scales is None else (codes, scales)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        codes, scales = parts[0], parts[1] if self.scaled else None
        values = torch.empty(codes.shape[0], GROUP, dtype=dtype, device=codes.device)
        step = values_at_a_time(codes.device) // GROUP
        for first in range(0, codes.shape[0], step):
            part = slice(first, first + step)
            some = codes[part] if self.bits == 8 else _one_in_a_byte(codes[part])
            self.decode(some, None if scales is None else scales[part], values[part])
        return values.view(-1)[:count]


@dataclass(frozen=True)
class Rows(ByRow):
    """Integers with a scale (bf16) for each row.

    An error is at most half a step (of 8 bits 1/254 of the largest value of the row, of 4 bits 1/14, without a sign
    1/508 and 1/28) and the rounding of the scale, 1/256 of the value. A row with a value that is not finite comes back
    without a finite value.

    Args:
        width: bits, 8 or 4.
        signed: whether there are values below zero.
    """

    width: int = 8
    signed: bool = True
    scaled: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        return self.width

    @property
    def _top(self) -> float:
        # A scale that was rounded down makes the largest value up to 1/255 larger than the top: without a sign the
        # last code is left to it; with one, half a step is room enough.
        return float(2**self.width - 2) / (2.0 if self.signed else 1.0)

    @property
    def _zero(self) -> float:
        return self._top if self.signed else 0.0

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        if kernels.usable(values):
            return kernels.pack_rows(values, self.width, self._top, self._zero)
        return super().pack(values)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        if kernels.usable(parts[0]):
            return kernels.unpack_rows(parts[0], parts[1], self.width, self._zero, count, dtype)
        return super().unpack(parts, count, dtype)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        largest = rows.abs().amax(1, keepdim=True)  # on the host many times faster than the norm
        scales = largest.div_(self._top).to(torch.bfloat16)
        # The scale as it will be read; a row of zeros must not be divided by zero.
        shares = scales.float().clamp_min_(_TINY).reciprocal_()
        return rounded(rows.mul(shares), self._zero).to(torch.uint8), scales

    def decode(self, codes: Tensor, scales: Tensor | None, into: Tensor) -> None:
        assert scales is not None
        into.copy_(codes).sub_(self._zero).mul_(scales)


@dataclass(frozen=True)
class FixedPoint(ByRow):
    """Multiples of ``2 ** -fraction`` with ``whole`` bits before the point, cut off at the ends of the range.

    Source: SlimFit's released code; algorithms.md 3.4. Ranges do not follow the values: what lies outside is lost.
    """

    whole: int
    fraction: int
    signed: bool = True

    @property
    def bits(self) -> int:
        return self.whole + self.fraction + int(self.signed)

    @property
    def _least(self) -> float:
        return -float(2 ** (self.whole + self.fraction)) if self.signed else 0.0

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        top = float(2 ** (self.whole + self.fraction) - 1)
        codes = rows.mul(float(2**self.fraction)).round_().clamp_(self._least, top)
        return codes.sub_(self._least).to(torch.uint8), None

    def decode(self, codes: Tensor, scales: Tensor | None, into: Tensor) -> None:
        into.copy_(codes).add_(self._least).mul_(float(2**-self.fraction))


@dataclass(frozen=True)
class Pruned(Format):
    """The largest tenth of the normalised values of each row, as SlimFit keeps the input of a resting LayerNorm.

    Native backward normalises what it is given with the exact mean and deviation, so the values come back as
    ``mean + kept / rstd``: it then sees the kept normalised values, and zeros.

    Args:
        width: values that are normalised together.
        eps: of the normalisation.
        share: of the values, kept.
    """

    width: int
    eps: float = 1e-5
    share: float = 0.1

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        rows = values.view(-1, self.width).float()
        variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
        deviation = variance.add_(self.eps).sqrt_()
        normal = rows.sub(mean).div_(deviation)
        places = normal.abs().topk(max(1, int(self.share * self.width)), dim=1, sorted=False).indices
        return normal.gather(1, places).to(values.dtype), places.to(torch.int32), mean, deviation

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        kept, places, mean, deviation = parts
        rows = mean.expand(-1, self.width).clone()
        rows.scatter_add_(1, places.long(), kept.float().mul(deviation))
        return rows.to(dtype).view(-1)


@dataclass(frozen=True)
class Bits(Format):
    """Which values are not zero, as 1 and 0, eight in a byte.

    Booleans come back as they were. Of the output of ReLU it is all that its backward pass asks.
    """

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        return (pack_bits(values),)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        return unpack_bits(parts[0], count, dtype)


@dataclass(frozen=True)
class Sides(Format):
    """Which values lie between two kinks, in a bit each: all that the gradient of a piecewise linear function asks.

    They come back as one value from the inside, and one from the outside; the gradient is exact.

    Args:
        low: the lower kink; the kinks themselves are outside.
        high: the upper one, or infinity.
    """

    low: float
    high: float

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        return (pack_bits((values > self.low).logical_and_(values < self.high)),)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        inside = (self.low + self.high) / 2 if self.high < math.inf else self.low + 1
        outside = self.low - abs(self.low) - 1  # in any precision below the kink
        return unpack_bits(parts[0], count, dtype).mul_(inside - outside).add_(outside)


@dataclass(frozen=True)
class Noise(Format):
    """The noise of dropout, which is 0 or one other value: exact."""

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        return pack_bits(values), values.amax().view(1)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        mask, other = parts
        return unpack_bits(mask, count, dtype).mul_(other)


def rounded(values: Tensor, zero: float) -> Tensor:
    """The integers nearest to ``values + zero``, in the lowest 22 bits of int32; ``values`` (fp32) are overwritten.

    The sum of a small number and 3 * 2 ** 22 has no room for digits after the point: one addition stands in for
    rounding, shifting and converting. ``zero`` is a whole number.
    """
    return values.add_(_ROUNDING + zero).view(torch.int32)


def _rows(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``values`` as fp32 rows, some at a time with the number of the first; the last is filled up with zeros."""
    whole = values.numel() // GROUP
    rows = values[: whole * GROUP].view(whole, GROUP)
    step = values_at_a_time(values.device) // GROUP
    for first in range(0, whole, step):
        yield first, rows[first : first + step].float()
    rest = values.numel() - whole * GROUP
    if rest:
        last = torch.zeros(1, GROUP, device=values.device)
        last[0, :rest] = values[whole * GROUP :]
        yield whole, last


def _two_in_a_byte(codes: Tensor) -> Tensor:
    """Codes below 16 ``[r, 128]`` in half the bytes ``[r, 64]``: halves of a row side by side, not neighbours."""
    half = GROUP // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _one_in_a_byte(codes: Tensor) -> Tensor:
    return torch.cat((codes & 15, codes >> 4), dim=1)
