"""What tests of several ranks share: the benchmarks' counter of what DDP sends, and a policy that goes both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.ranks import Traffic, active_bytes, counted, digest

from frostline.policies.base import Cadence, Decision, Explained, Observation, Policy, PolicyOptions

__all__ = ["Traffic", "Walk", "active_bytes", "counted", "digest"]


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
