"""What the tests of several ranks share: a counter of what DDP sends, a policy that goes both ways, a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from frostline.policies.base import Cadence, Decision, Explained, Observation, Policy, PolicyOptions


class Traffic:
    """Bytes of gradients that DDP has handed out for exchange."""

    def __init__(self) -> None:
        self.bytes = 0

    def taken(self) -> int:
        """The bytes since the last call."""
        found, self.bytes = self.bytes, 0
        return found


def counted(traffic, bucket):  # type: ignore[no-untyped-def] # DDP wants no annotations, or those of its own
    """A communication hook that does what DDP does without one, and counts."""
    traffic.bytes += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)


class WalkOptions(PolicyOptions):
    depths: tuple[int, ...]
    every: int = 3


class Walk(Policy[WalkOptions]):
    """The frost line goes where it is told, also back."""

    name = "walk"
    summary = "given depths, one after the other"
    Options = WalkOptions
    asked = 0

    def cadence(self) -> Cadence:
        return Cadence(self.options.every, "steps")

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        depth = self.options.depths[min(self.asked, len(self.options.depths) - 1)]
        self.asked += 1
        return Decision(depth), Explained("told so")

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


def active_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of what trains."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def digest(model: nn.Module) -> str:
    """Of all weights, bit for bit."""
    parts = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        parts.update(parameter.detach().numpy().tobytes())
    return parts.hexdigest()
