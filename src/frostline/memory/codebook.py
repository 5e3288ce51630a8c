"""A code book over the derivative of an activation function.

The backward pass of an elementwise function f uses its input x only through f'(x). So instead of x it is enough to keep
which of 16 levels f'(x) is nearest to; the backward pass is a product with that level. There is no scale and nothing is
cut off. The levels hold 0 and 1 exactly, because most units are dead or linear, and an error that all of them share
would add up (prototypes.md B3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frostline.memory import kernels
from frostline.memory.aside import nothing_packed
from frostline.memory.formats import ByRow, rounded
from frostline.memory.kernels import PLACES
from frostline.memory.layout import contiguous_strides, in_memory_order

__all__ = ["FUNCTIONS", "CodeBook", "coded_activation"]

FUNCTIONS = {
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu-tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": lambda x: torch.nn.functional.silu(x),
}
"""Functions whose derivative falls to a least value, rises through its whole range, and settles at 1."""

# Beyond it every derivative above is 0 or 1 to fp32.
_REACH = 24.0
_GRID = 1 << 19


class _Book(NamedTuple):
    steps: float  # places of the table for an input larger by 1
    codes: Tensor  # [PLACES]: the nearest level of the inputs at each place; 0 stands in the middle
    levels: Tensor  # [16]


@dataclass(frozen=True)
class CodeBook(ByRow):
    """Four bits for the derivative of a function of :data:`FUNCTIONS`: packed from its inputs, unpacked as levels."""

    function: str

    @property
    def bits(self) -> int:
        return 4

    def pack(self, values: Tensor) -> tuple[Tensor, ...]:
        if kernels.usable(values):
            book = _book(self.function, values.device)
            return (kernels.pack_book(values, book.codes, book.steps),)
        return super().pack(values)

    def unpack(self, parts: tuple[Tensor, ...], count: int, dtype: torch.dtype) -> Tensor:
        if kernels.usable(parts[0]):
            return kernels.unpack_book(parts[0], _book(self.function, parts[0].device).levels, count, dtype)
        return super().unpack(parts, count, dtype)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        book = _book(self.function, rows.device)
        middle = PLACES // 2
        # Further out the level is that of the last place. The mask keeps what is not a number inside of the table.
        places = rounded(rows.mul(book.steps).clamp_(-middle, middle - 1), middle).bitwise_and_(PLACES - 1)
        return book.codes.index_select(0, places.view(-1)).view_as(rows), None

    def decode(self, codes: Tensor, scales: Tensor | None, into: Tensor) -> None:
        book = _book(self.function, codes.device)
        into.copy_(book.levels.index_select(0, codes.reshape(-1).int()).view(codes.shape))


def coded_activation(x: Tensor, function: str) -> Tensor:
    """``function`` of :data:`FUNCTIONS` of ``x``, exactly; what is saved for its gradient are the codes.

    It has no second derivative: a backward pass with ``create_graph`` raises RuntimeError.
    """
    out: Tensor = _Coded.apply(x, function)  # type: ignore[no-untyped-call]
    return out


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str) -> Tensor:
        values, strides = in_memory_order(x)
        ctx.function, ctx.like = function, (x.dtype, x.shape, strides or contiguous_strides(x.shape))
        ctx.save_for_backward(*CodeBook(function).pack(values))
        return FUNCTIONS[function](x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"compressed {ctx.function} has no second derivative (create_graph=True): use memory level 'off', "
                "'safe' or 'published'"
            )
        dtype, shape, strides = ctx.like
        slopes = CodeBook(ctx.function).unpack(ctx.saved_tensors, shape.numel(), dtype)
        return slopes.as_strided(shape, strides).mul_(gradients[0]), None


@lru_cache(maxsize=32)
def _book(function: str, device: torch.device) -> _Book:
    """The levels of ``function`` and where they lie, from its derivative on a fine grid."""
    # It is first asked for while a model's forward pass is packed: what is saved here is none of it.
    with nothing_packed(), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        x = torch.linspace(-_REACH, _REACH, _GRID + 1, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(FUNCTIONS[function](x).sum(), x)
    grid = x.detach()
    low, high = float(slope.min()), float(slope.max())
    levels = torch.tensor([low, low / 2, 0.0, *(k / 12 for k in range(1, 13)), high], dtype=torch.float64)
    # Between two levels the border is their middle: count how many borders a slope has passed.
    codes = torch.bucketize(slope, (levels[1:] + levels[:-1]) / 2)
    changes = (codes[1:] != codes[:-1]).nonzero().view(-1)
    ends = (grid[changes] + grid[changes + 1]) / 2
    own = torch.cat((codes[:1], codes[changes + 1]))
    steps = PLACES / 2 / (1.1 * float(ends.abs().max()))
    at_places = (torch.arange(PLACES, dtype=torch.float64) - PLACES // 2) / steps
    table = own[torch.bucketize(at_places, ends)]
    return _Book(steps, table.to(torch.uint8).to(device), levels.float().to(device))
