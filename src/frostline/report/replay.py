"""Replay: what another policy, or other options, would have decided on the numbers a run recorded.

A policy is pure, so the recorded observations can be fed to a fresh one. That holds until it decides otherwise
than the run did: from there on other blocks would have trained, and the recorded numbers no longer say what
would have been measured. The replay ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.errors import ConfigError, FrostlineError
from frostline.policies.base import Cadence, Decision, Observation, Plan, Policy
from frostline.policies.registry import available, create
from frostline.report.run import Point, Run, load_run

__all__ = ["Replay", "ReplayStep", "replay"]


@dataclass(frozen=True)
class ReplayStep:
    """One evaluation, replayed: what the policy says and what the run did.

    ``evaluation`` is ``None`` for the decision before the first step. ``threshold`` is ``None`` where the policy
    took none.
    """

    evaluation: int | None
    step: int
    samples: int
    decision: Decision
    recorded: Decision
    reason: str
    threshold: float | None = None

    @property
    def agrees(self) -> bool:
        return self.decision == self.recorded


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay; ``steps`` ends with the first divergence, where there is one."""

    run: str
    policy: str
    options: dict[str, Any]
    recorded_policy: str
    blocks: int
    steps: tuple[ReplayStep, ...]
    recorded_evaluations: int
    notes: tuple[str, ...] = ()

    @property
    def divergence(self) -> ReplayStep | None:
        """The first evaluation where the policy decides otherwise than the run did."""
        return next((step for step in self.steps if not step.agrees), None)

    @property
    def trajectory(self) -> list[Point]:
        """The depths the policy would have taken, up to and including the first divergence."""
        points: list[Point] = []
        for step in self.steps:
            if not points or step.decision.depth != points[-1].depth:
                points.append(Point(step.step, step.samples, step.decision.depth))
        return points

    def render(self) -> str:
        """The replay as plain text: one line per evaluation, then what it amounts to."""
        given = ", ".join(f"{key}={value}" for key, value in self.options.items())
        lines = [
            f"replay of {self.run} (policy {self.recorded_policy}, {self.blocks} blocks) "
            f"with policy {self.policy}{f' ({given})' if given else ''}",
            f"{'eval':>5}  {'step':>7}  {'samples':>9}  {'depth':>5}  {'recorded':>8}  reason",
        ]
        for step in self.steps:
            label = "start" if step.evaluation is None else str(step.evaluation)
            reason = step.reason if step.threshold is None else f"{step.reason} (threshold {step.threshold:.4g})"
            lines.append(
                f"{label:>5}  {step.step:>7,}  {step.samples:>9,}  {step.decision.depth:>5}  "
                f"{step.recorded.depth:>8}  {reason}"
            )
        path = ", ".join(f"{point.depth} from {point.samples:,}" for point in self.trajectory)
        lines.append(f"trajectory (depth from sample): {path}")
        return "\n".join([*lines, *self.notes, self._verdict()])

    def _verdict(self) -> str:
        split = self.divergence
        if split is None:
            return f"no divergence: all {self.recorded_evaluations} recorded evaluations were decided alike"
        where = "at the start" if split.evaluation is None else f"at evaluation {split.evaluation}"
        if split.decision.depth != split.recorded.depth:
            what = f"depth {split.decision.depth}, recorded depth {split.recorded.depth}"
        else:
            what = f"other resting layers, {len(split.decision.resting)} now and {len(split.recorded.resting)} recorded"
        return (
            f"first divergence {where}, step {split.step:,} ({what}); what would follow is not known: "
            "with other blocks training, other numbers would have been measured"
        )

    def __str__(self) -> str:
        return self.render()


def replay(path: str | Path, policy: str, options: Mapping[str, Any] | None = None) -> Replay:
    """Feed the observations recorded in the run at ``path`` to a fresh ``policy`` with ``options``.

    Options that are not given are the run's own where it had the same policy, else the policy's defaults.

    Raises :class:`ConfigError` for an unknown policy or option, and where the policy needs a statistic, or
    intervals, that the run did not record; :class:`FrostlineError` where the run recorded no decisions.
    """
    run = load_run(path)
    if not run.decisions:
        raise FrostlineError(
            f"run '{run.path}' (policy {run.policy!r}) recorded no decisions, so there is nothing to replay: replay a "
            "run whose policy decides while it trains, for example gradient-norm"
        )
    chosen = {**(run.options if policy == run.policy else {}), **(options or {})}
    plan = _plan(run)
    fresh = create(policy, chosen, plan)
    notes = _check_statistics(run, fresh, plan)

    first = fresh.start()
    # The log has the depth of the first step, not what rested in it.
    recorded_first = Decision(run.trajectory[0].depth, first.resting)
    start = ReplayStep(None, 0, 0, first, recorded_first, "decision before the first step")
    steps = [start]
    if start.agrees:
        # A policy without a cadence is never asked again, as in a run of its own.
        asked = fresh.cadence() is not None
        for entry in run.decisions:
            seen = Observation.from_numbers(entry["observation"])
            recorded = Decision(int(entry["depth"]), frozenset(entry.get("resting") or ()))
            if asked:
                decision, explained = fresh.decide(seen)
                reason, threshold = explained.reason, explained.threshold
            else:
                decision, reason, threshold = start.decision, "decided once, before the first step", None
            if not entry.get("applied", True):
                # The engine had used up its moves: it would have held the line against any decision.
                decision = Decision(int(entry["depth_before"]), decision.resting)
                reason += "; held: no moves left"
            steps.append(
                ReplayStep(entry.get("evaluation"), seen.step, seen.samples, decision, recorded, reason, threshold)
            )
            if not steps[-1].agrees:
                break
    return Replay(run.name, policy, chosen, run.policy, plan.blocks, tuple(steps), len(run.decisions), notes)


def _plan(run: Run) -> Plan:
    try:
        return Plan.from_numbers(run.plan)
    except (TypeError, ValueError) as error:
        raise FrostlineError(f"the `run` event of '{run.path}' has no usable plan: {error}") from None


def _check_statistics(run: Run, fresh: Policy[Any], plan: Plan) -> tuple[str, ...]:
    """Refuse a replay on numbers that the policy would not have been given; note what is only inexact."""
    recorded_class = available().get(run.policy)
    recorded_needs = recorded_class.needs if recorded_class is not None else fresh.needs
    lacking = sorted(fresh.needs - recorded_needs)
    every = fresh.log_every
    if not lacking and fresh.needs and every > 1:
        raise ConfigError(
            f"policy {fresh.name!r} builds on every one of its decisions, and of run '{run.path}' each {every}th was "
            "recorded: it cannot be replayed; replay a run of a policy that decides now and then (gradient-norm)"
        )
    if not lacking and fresh.needs and any(entry["observation"].get("scores") is None for entry in run.decisions):
        lacking = sorted(fresh.needs)
    if lacking:
        raise ConfigError(
            f"policy {fresh.name!r} needs the statistic {', '.join(lacking)}, which run '{run.path}' (policy "
            f"{run.policy!r}) did not record: replay a run whose policy measures it"
        )
    wanted = fresh.cadence()
    had = create(run.policy, run.options, plan).cadence() if recorded_class is not None else None
    if wanted is None or had is None or wanted == had:
        return ()
    text = f"asks every {_every(wanted)}, the run was asked every {_every(had)}"
    if fresh.needs:
        raise ConfigError(
            f"policy {fresh.name!r} with these options {text}: the recorded statistic covers other intervals. "
            "Replay with the run's own interval (gradient-norm: the same evaluations_per_epoch)"
        )
    return (f"inexact: policy {fresh.name!r} {text}; it is shown at the recorded points only",)


def _every(cadence: Cadence) -> str:
    return f"{cadence.every:,.6g} {cadence.unit}"
