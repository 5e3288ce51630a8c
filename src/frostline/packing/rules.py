"""Which stage comes next when the frost line has moved: pure functions of what was measured.

The published text of AutoFreeze's packing rules is not available; this is a reading of its two goals (the shortest
time, the lowest cost) and of what is known of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from frostline.packing.options import PackOptions
from frostline.packing.stages import Job, Look, Stage, Stages

__all__ = ["Pace", "next_stage"]


@dataclass(frozen=True)
class Pace:
    """What a step takes, in seconds: ``fixed`` whatever its micro-batch holds, ``per_row`` more for each row of it.

    Where larger batches are padded so much more that they spare nothing, ``fixed`` is below zero.
    """

    fixed: float
    per_row: float

    def step(self, stage: Stage) -> float:
        return self.fixed + stage.accumulation * stage.rows * self.per_row


def next_stage(
    options: PackOptions,
    stages: Stages,
    now: Stage,
    *,
    depth: int,
    samples: int,
    left: int,
    pace: Pace,
    restart: float,
) -> Look:
    """The stage that follows the present one, if one fits and pays.

    Changing takes ``restart`` seconds of every rank of the next stage. With B samples in a step of t seconds on n
    ranks, what is left takes left / B * t seconds of time (performance), and n times that of cost (efficiency): the
    next stage is taken if it and its start take less, or if the present one does not fit any more.

    Args:
        options: what the user wants.
        stages: of the run so far, and what was measured of it.
        now: the one at work, which may have other ranks than was planned.
        depth: of the frost line from here on.
        samples: trained on so far.
        left: samples that are still to be trained on.
        pace: of the steps at this depth.
        restart: seconds from the end of one stage to the first step of the next.
    """
    job = stages.job
    assert job is not None, "what packs has been measured"
    first = stages.stages[0]
    if options.mode == "performance":
        chosen = _largest(options, job, first, depth)
    else:
        chosen = _fewest(job, first, depth, stages.per_host)
    stage = replace(chosen, number=now.number + 1, samples=samples, depth=depth)
    cost = options.mode == "efficiency"
    before, after = _seconds(now, pace, left, cost=cost), _seconds(stage, pace, left, cost=cost)
    start = restart * (stage.ranks if cost else 1)
    fits = job.peak(now.rows, depth) <= job.cap
    numbers: dict[str, Any] = {
        "mode": options.mode,
        "cap": job.cap,
        "peak_before": job.peak(now.rows, depth),
        "peak": job.peak(stage.rows, depth),
        "batch": stage.batch,
        "ranks": stage.ranks,
        "rows": stage.rows,
        "left": left,
        "fixed_seconds": pace.fixed,
        "row_seconds": pace.per_row,
        "rank_seconds_before" if cost else "seconds_before": before,
        "rank_seconds" if cost else "seconds": after,
        "restart_seconds": start,
    }
    same = (stage.ranks, stage.rows, stage.accumulation) == (now.ranks, now.rows, now.accumulation)
    # Told that a change costs nothing, do not ask two nearly equal times.
    taken = not same and (not fits or options.restart == 0 or after + start <= before)
    return Look(samples, depth, stage if taken else None, numbers)


def _seconds(stage: Stage, pace: Pace, left: int, *, cost: bool) -> float:
    return left / stage.batch * pace.step(stage) * (stage.ranks if cost else 1)


def _largest(options: PackOptions, job: Job, first: Stage, depth: int) -> Stage:
    """The first stage with the largest micro-batch that fits: a whole number of the first one's."""
    growth = max(
        (times for times in range(1, options.largest + 1) if job.peak(times * first.rows, depth) <= job.cap), default=1
    )
    return replace(first, rows=growth * first.rows, rate=options.factor(growth, adaptive=job.adaptive))


def _fewest(job: Job, first: Stage, depth: int, per_host: int) -> Stage:
    """The first stage's batch on the fewest ranks on which it fits; on several hosts these are whole hosts."""
    for ranks in range(1, first.ranks):
        rows = first.rows * first.ranks // ranks
        whole = first.ranks % ranks == 0 and (ranks <= per_host or ranks % per_host == 0)
        if whole and job.peak(rows, depth) <= job.cap:
            return replace(first, ranks=ranks, rows=rows)
    return first
