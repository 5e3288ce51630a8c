"""A plan of a whole recipe, against the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline.errors import ConfigError
from frostline.planning import ALONE, Forecast, forecast
from frostline.recipes.runner import run
from frostline.recipes.schema import Recipe
from frostline.simulator import Cluster, Link, Move, Trajectory
from tests.recipes.workbench import BLOCKS, recipe_content

SEVERAL = Cluster(device_memory=2**30, between=Link(bytes_per_second=1e9), restart_seconds=0.0)


def planned(root: Path, given: dict[str, Any] | None = None, **changes: Any) -> Forecast:
    return forecast(Recipe.model_validate(recipe_content(root, **changes)), **given or {})


def test_a_run_takes_the_steps_and_the_course_that_were_planned(workbench: Path) -> None:
    # 96 samples, 8 to a micro-batch, 3 of which make a step; the last step of an epoch has 3 too.
    freeze = {"policy": "ramp", "start": 0.0, "evaluations_per_epoch": 2}
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    found = planned(workbench, freeze=freeze, training=training)
    summary = run(Recipe.model_validate(recipe_content(workbench, freeze=freeze, training=training))).summary
    plain, frozen, cached = found.predictions
    assert [(p.policy, p.cache) for p in found.predictions] == [("none", False), ("ramp", False), ("ramp", True)]
    for prediction in found.predictions:
        assert prediction.simulation.steps == summary["steps"] == 12
    moves = {point["samples"]: point["depth"] for point in summary["trajectory"] if point["samples"] < 288}
    assert {stage.start: stage.depth for stage in frozen.simulation.stages} == moves
    assert len(moves) > 1
    assert plain.simulation.seconds > frozen.simulation.seconds
    # The peak is at depth 0, with which the ramp begins.
    assert plain.peak == frozen.peak == cached.peak
    assert not (workbench / "run" / "plan").exists()


def test_a_cache_pays_once_its_check_is_paid_for(workbench: Path) -> None:
    freeze = {"policy": "static", "depth": 3}
    short, long = (planned(workbench, freeze=freeze, training={"num_train_epochs": epochs}) for epochs in (1, 20))
    plain, frozen, cached = (prediction.simulation.seconds for prediction in long.predictions)
    assert plain > frozen > cached
    # In one epoch no record is read, and nothing compared.
    assert short.predictions[1].simulation.seconds == short.predictions[2].simulation.seconds


def test_gradients_decide_between_two_courses(workbench: Path) -> None:
    freeze = {"policy": "gradient-norm", "percentile": 60, "evaluations_per_epoch": 4, "initial_depth": 1}
    found = planned(workbench, freeze=freeze)
    plain, slow, _, fast, _ = found.predictions
    assert (slow.policy, fast.policy) == ("gradient-norm, slowest", "gradient-norm, fastest")
    assert fast.simulation.seconds < slow.simulation.seconds < plain.simulation.seconds
    assert slow.simulation.stages[-1].depth == 1
    assert fast.simulation.stages[-1].depth == BLOCKS - 1
    assert any("--trajectory" in note for note in found.notes)
    taken = run(Recipe.model_validate(recipe_content(workbench, freeze=freeze))).summary["trajectory"]
    for point in taken:
        depths = [
            next(s.depth for s in reversed(p.simulation.stages) if s.start <= point["samples"]) for p in (slow, fast)
        ]
        assert depths[0] <= point["depth"] <= depths[1]
    # Of what the policy keeps only the sums of gradients come on top: of the blocks above the line, in fp32.
    static = planned(workbench, freeze={"policy": "static", "depth": 1}).predictions[1]
    sums = sum(part.parameter_bytes for part in found.profile.parts[2:-1])
    assert slow.peak == static.peak + sums
    assert static.peak < plain.peak

    moves = Trajectory(moves=(Move(samples=0, depth=2), Move(samples=500, depth=3)))
    found = planned(workbench, {"trajectory": moves}, freeze=freeze)
    assert [p.policy for p in found.predictions] == ["none", "gradient-norm", "gradient-norm"]
    assert [stage.depth for stage in found.predictions[1].simulation.stages] == [2]
    assert any("later moves are left out (1)" in note for note in found.notes)


def test_several_ranks_are_packed(workbench: Path) -> None:
    training = {"max_steps": 12, "per_device_train_batch_size": 8}
    freeze = {"policy": "static", "depth": 2}
    found = planned(workbench, {"ranks": 2, "cluster": SEVERAL}, freeze=freeze, training=training)
    plain, *frozen = found.predictions
    packings = ["none", "performance", "efficiency"]
    assert [(p.cache, p.simulation.packing) for p in frozen] == [(c, p) for c in (False, True) for p in packings]
    assert found.epochs == 2.0  # 96 samples, 16 to a step
    assert plain.simulation.steps == 12
    performance, efficiency = frozen[1], frozen[2]
    assert performance.simulation.steps < 12
    assert performance.peak > frozen[0].peak
    assert efficiency.simulation.stages[0].ranks == 1
    # The buckets in which ranks exchange gradients come on top.
    alone = planned(workbench, freeze=freeze).predictions[1]
    assert frozen[0].peak >= alone.peak + sum(part.parameter_bytes for part in found.profile.above(2))
    assert plain.simulation.rank_hours == pytest.approx(2 * plain.simulation.seconds / 3600)


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"training": {"torch_compile": True}}, {}, "torch_compile=true"),
        ({"freeze": {"policy": "none"}}, {"trajectory": Trajectory(moves=())}, "set freeze.policy"),
        ({}, {"ranks": 2}, "several need a cluster"),
        ({}, {"ranks": 0, "cluster": SEVERAL}, "ranks=0"),
        ({"freeze": {"policy": "static", "depth": BLOCKS}}, {}, "valid depths: 0..3"),
        ({}, {"ranks": 2, "cluster": SEVERAL.model_copy(update={"device_memory": 10})}, "not even one sample fits"),
    ],
)
def test_what_cannot_be_planned_is_said(
    workbench: Path, changes: dict[str, Any], given: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        planned(workbench, given, **changes)


def test_one_rank_needs_no_cluster() -> None:
    assert ALONE.inside is None
    assert ALONE.price_per_rank_hour == 1.0
