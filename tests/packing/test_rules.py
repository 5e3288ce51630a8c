"""Which stage follows when the frost line has moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from frostline.errors import ConfigError
from frostline.packing import Job, Look, Pace, PackOptions, Stage, Stages, next_stage
from frostline.settings import options_from

FIRST = Stage(0, ranks=8, rows=4)
# Peak: 100 for what trains at depth 0 (25 less for each block), and 10 for each row and active block.
PEAKS = [[100 - 25 * depth + 10 * 4 * times * (4 - depth) for times in range(1, 9)] for depth in range(5)]
JOB = Job(rows=4, peaks=PEAKS, row_seconds=0.01, cap=PEAKS[0][0], adaptive=True)


def look(
    mode: str, depth: int, *stages: Stage, job: Job = JOB, per_host: int = 8, largest: int = 8, restart: float = 0.0
) -> Look:
    return next_stage(
        PackOptions(mode=mode, largest=largest), Stages("", per_host, list(stages or [FIRST]), job=job),
        (stages or [FIRST])[-1], depth=depth, samples=640, left=10_000, pace=Pace(0.1, 0.01), restart=restart,
    )  # fmt: skip


@pytest.mark.parametrize(("depth", "ranks"), [(0, 8), (1, 8), (2, 4), (3, 2), (4, 1)])
def test_efficiency_takes_the_fewest_ranks_on_which_the_same_batch_fits(depth: int, ranks: int) -> None:
    found = look("efficiency", depth).stage
    stage = found or FIRST
    assert (stage.ranks, stage.batch, stage.rate) == (ranks, FIRST.batch, 1.0)
    assert JOB.peak(stage.rows, depth) <= JOB.cap
    if found is not None:
        assert (found.number, found.samples, found.depth) == (1, 640, depth)


@pytest.mark.parametrize(("depth", "growth"), [(0, 1), (1, 1), (2, 2), (3, 5), (4, 8)])
def test_performance_takes_the_largest_batch_that_fits(depth: int, growth: int) -> None:
    stage = look("performance", depth).stage or FIRST
    assert (stage.ranks, stage.rows) == (8, 4 * growth)
    assert stage.rate == pytest.approx(growth**0.5)
    assert JOB.peak(stage.rows, depth) <= JOB.cap


def test_performance_stops_at_the_largest_batch_that_is_allowed() -> None:
    stage = look("performance", 4, largest=3).stage
    assert stage is not None
    assert stage.rows == 12


@pytest.mark.parametrize(("mode", "saved"), [("performance", 10_000 / 32 * (0.1 * 4 / 5)), ("efficiency", 187.5)])
def test_a_stage_is_taken_where_it_saves_more_than_its_start(mode: str, saved: float) -> None:
    # Performance at depth 3 saves the fixed part of four in five steps; efficiency that of 6 of 8 ranks.
    ranks = 1 if mode == "performance" else 2
    assert look(mode, 3, restart=0.99 * saved / ranks).stage is not None
    refused = look(mode, 3, restart=1.01 * saved / ranks)
    assert refused.stage is None
    assert refused.numbers["restart_seconds"] == pytest.approx(1.01 * saved)


def test_what_does_not_fit_any_more_changes_whatever_it_costs() -> None:
    few = Stage(2, ranks=2, rows=16)  # as at depth 3; the line has gone back to 2
    stage = look("efficiency", 2, FIRST, few, restart=1e9).stage
    assert stage is not None
    assert (stage.number, stage.ranks) == (3, 4)


@pytest.mark.parametrize(
    ("fits", "per_host", "ranks"), [(3, 6, 4), (3, 4, 4), (3, 3, 6), (2, 6, 6), (2, 4, None), (2, 12, 6)]
)
def test_several_hosts_leave_whole(fits: int, per_host: int, ranks: int | None) -> None:
    """``fits``: as many times the first micro-batch as a rank holds."""
    twelve, sizes = replace(FIRST, ranks=12), [int(times > fits) for times in range(1, 13)]
    job = replace(JOB, peaks=[[0] * 12, sizes, sizes, sizes, sizes], cap=0)
    stage = look("efficiency", 1, twelve, job=job, per_host=per_host).stage
    assert (stage and stage.ranks) == ranks


@pytest.mark.parametrize(
    ("rate", "adaptive", "factor"),
    [("auto", True, 2.0), ("auto", False, 4.0), ("linear", True, 4.0), ("sqrt", False, 2.0), ("none", True, 1.0)],
)
def test_the_learning_rate_follows_the_batch(rate: str, adaptive: bool, factor: float) -> None:
    assert PackOptions(rate=rate).factor(4, adaptive=adaptive) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "cheap"}, "cheap.*efficiency, none, performance"),
        ({"rate": "cubic"}, "cubic.*auto, linear, none, sqrt"),
        ({"largest": 0}, "largest"),
        ({"memory": 0}, "memory"),
        ({"price": -1}, "price"),
        ({"ranks": 2}, "ranks"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_from(settings, PackOptions, "pack")
