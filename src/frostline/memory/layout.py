"""How the values of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["contiguous_strides", "in_memory_order"]


def in_memory_order(tensor: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """``tensor`` with its dimensions in the order of memory, so that it is contiguous, and its own strides.

    Of one with gaps a copy, and ``None``.
    """
    if tensor.is_contiguous():
        return tensor, tensor.stride()
    strides = tensor.stride()
    laid = tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
    return (laid, strides) if laid.is_contiguous() else (tensor.contiguous(), None)


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of a tensor of ``shape`` without gaps, the last dimension running fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
