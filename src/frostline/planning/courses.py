"""Where the frost line of a run is going to lie, as far as its policy says before anything is trained.

The policy itself is asked, at the steps at which the engine would ask it. One that measures nothing (static, ramp,
random-blocks) answers as it will in the run. One that decides on gradients is asked twice, with scores that are made
up: those that never change freeze nothing, and those of which the lowest block's changes least each time, the next
one's a little more, freeze all that its options allow. Its run lies between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from frostline.clock import Clock
from frostline.policies.base import Observation, Plan
from frostline.policies.registry import create
from frostline.simulator import Course, Move

__all__ = ["foresee"]

Scores = Callable[[int, int], dict[int, float]]
"""The score of each block at a number of an evaluation, for a number of blocks."""


def foresee(
    policy: str, options: Mapping[str, Any], plan: Plan, clock: Clock, *, max_depth_changes: int | None = None
) -> dict[str, Course]:
    """The courses that a run may take.

    Args:
        policy: its name.
        options: the policy's own.
        plan: of the run.
        clock: its length; it is not moved.
        max_depth_changes: bound on the moves of the frost line, the first one from depth 0 included.

    Returns:
        The course, by the policy's name; or, where that depends on gradients, the ``slowest`` and the ``fastest``.

    Raises:
        ConfigError: an unknown policy or option, or one that is left to a memory budget.
    """
    sides: dict[str, Scores | None] = {policy: None}
    if "gradient_sum" in create(policy, options, plan).needs:
        sides = {f"{policy}, slowest": _steady, f"{policy}, fastest": _calmest_first}
    return {name: _asked(policy, options, plan, clock, max_depth_changes, scores) for name, scores in sides.items()}


def _asked(
    policy: str, options: Mapping[str, Any], plan: Plan, clock: Clock, most: int | None, scores: Scores | None
) -> Course:
    """What a fresh policy decides over a run."""
    asked = create(policy, options, plan)
    cadence, depth = asked.cadence(), asked.start().depth
    moves = [Move(samples=0, depth=depth)] if depth else []
    now = Clock(clock.steps_per_epoch, clock.epochs, clock.batch_size, clock.samples_per_epoch)
    evaluations, last = 0, round(clock.steps_per_epoch * clock.epochs)
    # What is decided after the last step is never trained with.
    while cadence is not None and now.step < last - 1:
        now.step += 1
        if cadence.times(step=now.step, samples=now.samples) <= evaluations:
            continue
        evaluations += 1
        seen = Observation(
            step=now.step,
            samples=now.samples,
            progress=now.samples / plan.total_samples,
            depth=depth,
            blocks=plan.blocks,
            scores=scores(evaluations, plan.blocks) if scores is not None else None,
            interval_steps=1,
        )
        wanted = asked.decide(seen)[0].depth
        if wanted != depth and (most is None or len(moves) < most):
            depth = wanted
            moves.append(Move(samples=now.samples, depth=depth))
    return Course(tuple(moves), clock.samples_per_epoch, clock.epochs)


def _steady(evaluation: int, blocks: int) -> dict[int, float]:
    return dict.fromkeys(range(blocks), 1.0)


def _calmest_first(evaluation: int, blocks: int) -> dict[int, float]:
    # Up and down again: however long the run, the numbers stay in range.
    return {block: 1.0 + (evaluation % 2) * (block + 1) / blocks for block in range(blocks)}
