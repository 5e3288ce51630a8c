"""One training pass of a model, with and without compression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from frostline.memory import compressing, saved
from frostline.memory.levels import Level

__all__ = ["Pass", "cosine", "everything_packs", "packed_roles", "run"]


class Pass:
    """Loss, gradients by name, and the state of the generator after the backward pass."""

    def __init__(self, loss: Tensor, gradients: dict[str, Tensor], random: Tensor) -> None:
        self.loss, self.gradients, self.random = loss, gradients, random


def run(model: nn.Module, inputs: Mapping[str, Any], level: str | Level | None, *, seed: int = 3, **more: Any) -> Pass:
    """Forward and backward from ``seed``; ``level`` ``None``: without anything of ours."""
    transformers.set_seed(seed)
    model.zero_grad(set_to_none=True)
    if level is None:
        loss = model(**inputs).loss
    else:
        with compressing(model, level, **more):
            loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Pass(loss.detach(), gradients, torch.get_rng_state())


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Between two sets of gradients, all in one vector."""
    a = torch.cat([one[name].flatten().double() for name in one])
    b = torch.cat([other[name].flatten().double() for name in one])
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@contextmanager
def everything_packs() -> Iterator[None]:
    """The tensors of tiny models are too small to be worth packing: pack them all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "SMALL", 2)
        yield


@contextmanager
def packed_roles() -> Iterator[list[str]]:
    """The role of every tensor that is packed, in order, whoever packs."""
    found: list[str] = []
    pack = saved.Shelf._packed

    def counted(shelf: saved.Shelf, tensor: Tensor, call: Any, role: Any, how: Any) -> Any:
        found.append(role.name)
        return pack(shelf, tensor, call, role, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved.Shelf, "_packed", counted)
        yield found
