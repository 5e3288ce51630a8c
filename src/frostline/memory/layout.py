"""How the values of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["contiguous_strides", "in_memory_order"]


def in_memory_order(tensor: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """The values of ``tensor`` as they lie in memory, and its strides; of one with gaps a copy, and ``None``."""
    if tensor.is_contiguous():
        return tensor.view(-1), tensor.stride()
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    laid = tensor.permute(order)
    if laid.is_contiguous():
        return laid.reshape(-1), tensor.stride()
    return tensor.reshape(-1), None


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of a tensor of ``shape`` without gaps, the last dimension running fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
