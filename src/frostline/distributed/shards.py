"""Parameters that are split over ranks (``DTensor``, as ``fully_shard`` makes them): this rank's part, and all parts.

``fully_shard`` (FSDP2) lets each parameter be frozen and thawed in place, and exchanges no gradient of a frozen one.
What is left to do: measure parts and add them up, and see to it that modules hold their own parameters when these are
changed, not the gathered copies that they compute with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "NOT_CACHED_SPLIT",
    "NOT_COMPRESSED_SPLIT",
    "is_split",
    "local",
    "parts_again",
    "put_back",
    "start_over",
    "total",
    "whole",
]

NOT_CACHED_SPLIT = (
    "the model is split over ranks (fully_shard): boundary activations are not cached, because a rank that finds its "
    "records and one that computes would wait for each other for ever"
)
NOT_COMPRESSED_SPLIT = (
    "the model is split over ranks (fully_shard): what its backward pass needs is not compressed in this version; use "
    "memory='off'"
)


def _kind() -> tuple[Any, ...]:
    """The class of tensors that are split."""
    # Not imported here: that takes a while, and whoever has split a model has done it.
    module = sys.modules.get("torch.distributed.tensor")
    return (module.DTensor,) if module is not None else ()


def is_split(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is split over ranks."""
    kind = _kind()
    return bool(kind) and any(isinstance(parameter, kind) for parameter in model.parameters())


def local(tensor: Any) -> Tensor:
    """This rank's part of ``tensor``, without a graph; a tensor that is not split is its own part."""
    if isinstance(tensor, _kind()):
        with torch.no_grad():
            tensor = tensor.to_local()
    part: Tensor = tensor
    return part


def whole(tensor: Any) -> Tensor:
    """All parts of ``tensor`` together; every rank must ask."""
    joined: Tensor = tensor.full_tensor() if isinstance(tensor, _kind()) else tensor
    return joined


def parts_again(value: Tensor, like: Any) -> Tensor:
    """A copy of ``value``, a whole tensor, on the device of ``like`` and split as that is; every rank must ask."""
    copied = value.to(like.device, copy=True)
    if not isinstance(like, _kind()):
        return copied
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(copied, like.device_mesh, like.placements)


def total(sums: Sequence[float], tensors: Sequence[Any]) -> list[float]:
    """Sums over this rank's part of each tensor, added up over all parts: the same numbers on every rank.

    Args:
        sums: one for each of ``tensors``.
        tensors: the same ones, in the same order, on every rank.
    """
    kind = _kind()
    found = list(sums)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, kind):
            split = tuple(d for d, placement in enumerate(tensor.placements) if placement.is_shard())
            groups.setdefault((tensor.device_mesh, split), []).append(place)
    for (mesh, split), places in groups.items():
        together = torch.tensor([found[place] for place in places], dtype=torch.float64, device=mesh.device_type)
        for dimension in split:
            dist.all_reduce(together, group=mesh.get_group(dimension))
        for place, number in zip(places, together.tolist(), strict=True):
            found[place] = number
    return found


def put_back(model: nn.Module) -> None:
    """Let every module hold its own parameters: after a forward pass without a backward pass some hold copies."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


def start_over(model: Any) -> None:
    """Let ``model`` forget a pass that ended in an error."""
    if is_split(model) and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
