"""Policy ``none``: plain fine-tuning. The engine installs nothing for it (law 2)."""

from __future__ import annotations

from frostline.policies.base import Decision, Explained, Observation, Policy, PolicyOptions

__all__ = ["NoFreezing"]


class NoFreezing(Policy[PolicyOptions]):
    """Never freezes anything."""

    name = "none"
    summary = "plain fine-tuning; installs nothing"

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        return Decision(), Explained("policy none never freezes")
