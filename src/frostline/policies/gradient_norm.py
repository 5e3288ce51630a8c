"""Policy ``gradient-norm``: the test of AutoFreeze (Liu et al., arXiv 2102.01386, Algorithm 1).

Over an interval the gradients of each active block are summed as vectors. With D(T, l) that sum for block l
after interval T, the relative change is

    eta_l = | |D(T-1, l)| - |D(T, l)| | / |D(T-1, l)|        (L1 norms, as the released code takes them)

and the active blocks are walked from the input side: a block freezes while eta_l is below the N-th percentile
of all active blocks' eta; the first block at or above it stops the walk. The first interval is the reference.

Two options go beyond the paper; both are off by default. The test compares blocks with each other, so it finds one to
freeze whether it has converged or not: ``start`` holds it back. And the lowest blocks of a pre-trained model may stand
still from the first step (``initial_depth``), which pays for training the others for longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from frostline.policies.base import (
    Cadence,
    Decision,
    Explained,
    Observation,
    Plan,
    Policy,
    PolicyOptions,
    checked_depth,
)

__all__ = ["GradientNorm", "GradientNormOptions"]


class GradientNormOptions(PolicyOptions):
    """``percentile`` N: higher freezes faster; ``evaluations_per_epoch``: 2 to 5 keep the sums representative.

    ``initial_depth``: blocks frozen from the first step; ``start``: share of the run before the test freezes more.
    """

    percentile: float = Field(default=50.0, ge=0.0, le=100.0)
    evaluations_per_epoch: int = Field(default=5, ge=1)
    initial_depth: int = Field(default=0, ge=0)
    start: float = Field(default=0.0, ge=0.0, lt=1.0)


class GradientNorm(Policy[GradientNormOptions]):
    """Freezes a prefix of blocks whose accumulated gradient has stopped changing; never thaws."""

    name = "gradient-norm"
    summary = "AutoFreeze: blocks whose accumulated gradient norm has stopped changing"
    Options = GradientNormOptions
    needs = frozenset({"gradient_sum"})

    def __init__(self, options: GradientNormOptions, plan: Plan) -> None:
        super().__init__(options, plan)
        self.initial_depth = checked_depth(
            options.initial_depth, plan, f"policy 'gradient-norm', initial_depth={options.initial_depth}"
        )
        self.reference: dict[int, float] = {}

    def cadence(self) -> Cadence:
        return Cadence(self.plan.samples_per_epoch / self.options.evaluations_per_epoch)

    def start(self) -> Decision:
        return Decision(self.initial_depth)

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        assert seen.scores is not None, "gradient-norm needs the gradient_sum statistic"
        # Per step, so that an interval of one step more or less does not look like a change of the gradient.
        steps = max(1, seen.interval_steps)
        norms = {block: value / steps for block, value in seen.scores.items() if block >= seen.depth}
        hold = Decision(seen.depth)
        broken = sorted(block for block, value in norms.items() if not math.isfinite(value))
        if broken:
            # Keep the old reference: the next interval is compared with the last one that was sound.
            return hold, Explained(f"gradients of blocks {broken} are not finite: nothing frozen")
        reference, self.reference = self.reference, norms
        if not reference:
            return hold, Explained("first evaluation: the reference")
        if len(norms) < 2:
            return hold, Explained("one active block: it always trains")
        changes = {block: _change(reference.get(block), value) for block, value in sorted(norms.items())}
        if seen.progress < self.options.start:
            return hold, Explained(f"nothing more freezes before {self.options.start:g} of the run", changes)
        finite = [change for change in changes.values() if math.isfinite(change)]
        if not finite:
            return hold, Explained("the reference is zero for every active block: nothing frozen", changes)
        threshold = float(np.percentile(finite, self.options.percentile))
        depth = seen.depth
        while depth < seen.blocks - 1 and changes[depth] < threshold:
            depth += 1
        frozen = depth - seen.depth
        reason = (
            f"{frozen} more block{'s' * (frozen != 1)} below the threshold" if frozen else "first active block moves"
        )
        return Decision(depth), Explained(reason, changes, threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"reference": {str(block): value for block, value in self.reference.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference = {int(block): float(value) for block, value in state["reference"].items()}


def _change(before: float | None, now: float) -> float:
    """Relative change of a norm; infinite (the block stays active) where there is nothing to compare with."""
    return abs(before - now) / before if before else math.inf
