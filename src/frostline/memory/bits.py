"""Eight truth values in a byte: numpy has a vectorised routine for the host, a GPU has a kernel of ours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from frostline.memory import kernels

__all__ = ["pack_bits", "unpack_bits", "values_at_a_time"]


def values_at_a_time(device: torch.device) -> int:
    """How many values are worked on at a time: on the host few enough to stay near the processor."""
    return 1 << 18 if device.type == "cpu" else 1 << 26


def pack_bits(values: Tensor) -> Tensor:
    """Bytes ``[ceil(n / 8)]`` that say which of ``values``, ``n`` in a contiguous tensor, are not zero."""
    if kernels.usable(values):
        return kernels.pack_bits(values)
    values = values.view(-1)
    packed = torch.empty(-(-values.numel() // 8), dtype=torch.uint8, device=values.device)
    step = values_at_a_time(values.device)
    for start in range(0, values.numel(), step):
        true = values[start : start + step] != 0
        part = packed[start // 8 : (start + step) // 8]
        if values.device.type == "cpu":
            part.numpy()[:] = np.packbits(true.numpy(), bitorder="little")
        else:
            padded = torch.nn.functional.pad(true.to(torch.uint8), (0, -true.numel() % 8)).view(-1, 8)
            torch.sum(padded * _powers(values.device), 1, dtype=torch.uint8, out=part)
    return packed


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` values of ``dtype``, 1 (true) or 0, for bytes that :func:`pack_bits` gave."""
    if kernels.usable(packed):
        return kernels.unpack_bits(packed, count, dtype)
    values = torch.empty(count, dtype=dtype, device=packed.device)
    step = values_at_a_time(packed.device)
    for start in range(0, count, step):
        part, some = values[start : start + step], packed[start // 8 : (start + step) // 8]
        if packed.device.type == "cpu":
            part.copy_(torch.from_numpy(np.unpackbits(some.numpy(), count=part.numel(), bitorder="little")))
        else:
            bits = some.unsqueeze(1).bitwise_and(_powers(packed.device)).view(-1)
            part.copy_(bits[: part.numel()] != 0)
    return values


@lru_cache(maxsize=32)
def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
