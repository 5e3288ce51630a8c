"""What a policy is told of a run before it begins."""

from __future__ import annotations

from frostline.blocks import BlockStack
from frostline.policies.base import Plan

__all__ = ["plan_for"]


def plan_for(stack: BlockStack, samples_per_step: int, samples_per_epoch: int, epochs: float) -> Plan:
    """The plan of a run that trains ``stack``."""
    trained = [name for name, parameter in stack.model.named_parameters() if parameter.requires_grad]
    layers = tuple(name for name in trained if not name.endswith("bias"))
    return Plan(
        block_paths=tuple(stack.block_paths),
        stem_paths=stack.paths_of("stem"),
        head_paths=stack.paths_of("head"),
        samples_per_step=samples_per_step,
        samples_per_epoch=samples_per_epoch,
        epochs=epochs,
        layer_paths=layers,
        bias_paths=tuple(name for name in trained if name.endswith("bias")),
        layer_depths=tuple(_freezes_at(stack, name) for name in layers),
    )


def _freezes_at(stack: BlockStack, name: str) -> int:
    """The depth from which on a parameter is frozen; 0: never."""
    owner = stack.owners[name]
    if owner == "head":
        return 0
    return 1 if owner == "stem" else owner + 1
