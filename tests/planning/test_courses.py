"""The course that is foreseen is the one that a run takes."""

from __future__ import annotations

import math
from typing import Any

import pytest

import frostline
from frostline.clock import Clock
from frostline.planning import foresee
from frostline.policies import Plan
from frostline.simulator import Course
from frostline.simulator.published import setup
from tests.adapters.hosts import bert

BLOCKS = 12


def plan(clock: Clock, blocks: int = BLOCKS) -> Plan:
    paths = tuple(f"layer.{block}" for block in range(blocks))
    return Plan(paths, ("stem",), ("head",), clock.batch_size, clock.samples_per_epoch, clock.epochs)


def moves(course: Course) -> list[tuple[int, int]]:
    return [(move.samples, move.depth) for move in course.moves]


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "static", "depth": 2},
        {"policy": "static", "depth": 0},
        {"policy": "ramp", "start": 0.2, "evaluations_per_epoch": 4},
        {"policy": "ramp", "start": 0.0, "evaluations_per_epoch": 1},  # moves with the last step, for nothing
        {"policy": "ramp", "start": 0.0, "evaluations_per_epoch": 4, "max_depth_changes": 1},
        {"policy": "random-blocks", "active": 1, "every": 2},
        {"policy": "interlayer", "share": 0.5, "line": {"policy": "ramp", "start": 0.0, "evaluations_per_epoch": 3}},
    ],
    ids=str,
)
def test_a_policy_that_measures_no_gradients_is_foreseen_exactly(options: dict[str, Any]) -> None:
    # 7 steps of at most 4 samples an epoch; the last one has 1.
    run = frostline.Frostline(
        bert(), None, steps_per_epoch=7, epochs=3, batch_size=4, samples_per_epoch=25, **options
    )  # fmt: skip
    own = {key: value for key, value in options.items() if key not in ("policy", "max_depth_changes")}
    (found,) = foresee(
        options["policy"], own, run.plan, run.clock, max_depth_changes=options.get("max_depth_changes")
    ).values()
    for _ in range(21):
        run.after_step()
    taken = [(move["samples"], move["depth"]) for move in run.summary()["trajectory"]]
    assert moves(found) == [(samples, depth) for samples, depth in taken if samples < 75]
    assert found.samples == 75
    if options["policy"] == "ramp":
        assert len(found.moves) == options.get("max_depth_changes", len(found.moves)) > 0


def test_the_fastest_way_down_is_that_of_the_published_rule() -> None:
    published = setup().course
    clock = Clock(200, published.epochs, 600, published.samples_per_epoch)
    found = foresee("gradient-norm", {"percentile": 50, "evaluations_per_epoch": 5}, plan(clock), clock)
    assert list(found) == ["gradient-norm, slowest", "gradient-norm, fastest"]
    assert moves(found["gradient-norm, slowest"]) == []
    assert moves(found["gradient-norm, fastest"]) == moves(published)


def test_the_courses_follow_the_options() -> None:
    clock = Clock(100, 4, 10)
    options = {"percentile": 75, "evaluations_per_epoch": 10, "initial_depth": 2, "start": 0.65}
    slow, fast = foresee("gradient-norm", options, plan(clock), clock).values()
    assert moves(slow) == [(0, 2)]
    assert moves(fast)[0] == (0, 2)
    first = moves(fast)[1]
    # Of ten active blocks eight are below the 75th percentile: 3/4 of the nine steps between them, rounded up.
    assert first == (math.ceil(0.65 * 40) * 100, 2 + math.ceil(0.75 * 9))
    assert fast.moves[-1].depth == BLOCKS - 1
