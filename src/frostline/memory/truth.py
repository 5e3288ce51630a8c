"""How true compressed gradients are: one pass with compression against the same pass without."""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.blocks import BlockStack, Owner
from frostline.memory.compressor import compressing
from frostline.trace import Call, undisturbed

__all__ = ["gradient_cosines"]


def gradient_cosines(stack: BlockStack, call: Call, level: str) -> dict[str, float]:
    """Cosine of the angle between compressed and exact gradients, by part: ``stem``, ``block 0`` .., ``head``.

    Both passes draw the same random numbers. Gradients that are there already, buffers and the random state stay as
    they are. Parts in which nothing trains are left out.

    Args:
        stack: of the model, which is in train mode.
        call: positional and keyword arguments of a pass that returns an object with a ``loss``.
        level: name of a level.
    """
    exact, packed = (_gradients(stack, call, name) for name in ("off", level))
    found = {}
    owners: list[Owner] = ["stem", *range(len(stack)), "head"]
    for owner in owners:
        names = [name for name in stack.parameters_of(owner) if name in exact]
        if names:
            label = f"block {owner}" if isinstance(owner, int) else owner
            found[label] = _cosine([exact[name] for name in names], [packed[name] for name in names])
    return found


def _gradients(stack: BlockStack, call: Call, level: str) -> dict[str, Tensor]:
    model = stack.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with undisturbed(model, [model]), torch.enable_grad():
        with compressing(model, level):
            loss = model(*call[0], **call[1]).loss
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: value for name, value in zip(trained, found, strict=True) if value is not None}


def _cosine(one: list[Tensor], other: list[Tensor]) -> float:
    """Summed in double precision, tensor by tensor: one vector of a block would be another copy of its gradients."""
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    sizes = [sum(float(value.double().square().sum()) for value in side) for side in (one, other)]
    return float(product / max((sizes[0] * sizes[1]) ** 0.5, torch.finfo(torch.float64).tiny))
