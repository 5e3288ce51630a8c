"""How the values of a record are written: as they are, or in fewer bits.

Encoding and decoding run on the model's device, so fewer bytes cross to the host as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CODECS", "Codec"]

_SCALE = 4  # bytes of a token's scale


class Codec(NamedTuple):
    """``encode``: ``[rows, ..., width]`` to what is kept, token by token; ``decode``: that and the dtype at the line.

    A decoded token of zeros is zeros: padding is filled in before decoding.
    """

    name: str
    lossy: bool
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]


def _rounded(name: str, dtype: torch.dtype) -> Codec:
    return Codec(name, True, lambda value: value.to(dtype), lambda kept, line: kept.to(line))


def _quantised(value: Tensor) -> Tensor:
    """``[..., width]`` to ``[..., width + 4]`` bytes: 8-bit integers, and the scale of each token in fp32."""
    wide = value.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    steps = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([steps.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def _dequantised(kept: Tensor, line: torch.dtype) -> Tensor:
    steps = kept[..., :-_SCALE].view(torch.int8)
    scale = kept[..., -_SCALE:].contiguous().view(torch.float32)
    return (steps.float() * scale).to(line)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("raw", False, lambda value: value, lambda kept, line: kept),
        _rounded("bf16", torch.bfloat16),
        _rounded("fp16", torch.float16),
        Codec("int8", True, _quantised, _dequantised),
    )
}
