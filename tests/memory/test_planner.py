"""A budget is met by the fastest way that fits, or refused with the least that would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frostline import BlockStack
from frostline.errors import ConfigError
from frostline.memory import Bench, MemoryPlan, OptimizerCost, Way, candidates, plan_memory
from tests.memory.test_model import adamw, bench_of, bert, whole_step

ADAM = OptimizerCost(2.0, 0.0)
ROWS = 16


@pytest.fixture
def bench() -> Bench:
    return bench_of(BlockStack.find(bert()))


def plan(bench: Bench, budget: int, ways: Any = None, **more: Any) -> MemoryPlan:
    return plan_memory(bench, ways or candidates("slimfit", checkpoints=True), ADAM, budget=budget, rows=ROWS, **more)


def test_what_fits_is_left_alone(bench: Bench) -> None:
    found = plan(bench, 10**12)
    assert not found.changes
    assert (found.rows, found.steps, found.level, found.checkpointing) == (ROWS, 1, "off", False)
    assert "as it is" in str(found)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_a_budget_is_met_by_a_step_that_is_measured(bench: Bench, share: float) -> None:
    plain = plan(bench, 10**12).plain
    found = plan(bench, int(share * plain))
    assert found.changes
    assert found.rows * found.steps == ROWS
    way = Way(found.level, found.checkpointing)
    assert whole_step(bench, way, found.rows) <= share * plain
    assert found.peak <= share * plain < found.plain
    assert all(one.peak <= share * plain for one in found.considered)


def test_of_what_fits_the_fastest_is_taken_and_ties_go_to_the_exact(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = int(0.9 * plan(bench, 10**12).plain)
    costs = {"off": 2.0, "safe": 1.0, "slimfit": 0.97}
    monkeypatch.setattr(
        Bench, "seconds", lambda self, way, rows: rows * (3.0 if way.checkpointing else costs[way.level])
    )
    assert plan(bench, budget).level == "safe"
    costs["slimfit"] = 0.9
    assert plan(bench, budget).level == "slimfit"
    costs["safe"] = costs["slimfit"] = 1.99
    assert plan(bench, budget).level == "off"


def test_a_model_whose_micro_batches_matter_keeps_its_batch(bench: Bench) -> None:
    found = plan(bench, int(0.7 * plan(bench, 10**12).plain), splits=False)
    assert (found.rows, found.steps) == (ROWS, 1)


def test_a_budget_that_cannot_be_met_says_what_the_least_is(bench: Bench) -> None:
    weights = sum(p.numel() * 4 for p in bench.model.parameters())
    with pytest.raises(
        ConfigError, match=r"memory.budget=\d+ MiB cannot be met: a step takes at least (\d+) MiB"
    ) as said:
        plan(bench, 2 * weights)
    least = int(str(said.value).split("at least ")[1].split(" ")[0])
    # A mebibyte more for what rounding takes away, and five per cent for the model's error.
    assert plan(bench, int((least + 1) * 2**20 * 1.05)).changes


def test_the_ways_that_may_be_chosen() -> None:
    assert candidates("off", checkpoints=False) == [Way()]
    assert candidates("off", checkpoints=True) == [Way(), Way(checkpointing=True)]
    assert candidates("slimfit", checkpoints=False) == [Way(), Way("safe"), Way("slimfit")]
    assert candidates("max", checkpoints=False)[-1] == Way("max")
    assert candidates("published", checkpoints=False) == [Way(), Way("published")]


def test_a_way_for_which_the_device_has_no_memory_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = int(0.7 * plan(bench, 10**12).plain)
    run = Bench.spans

    def short(self: Bench, way: Way, rows: int) -> Any:
        if way.level == "safe" and rows > 4:
            raise torch.OutOfMemoryError("none left")
        return run(self, way, rows)

    monkeypatch.setattr(Bench, "spans", short)
    found = plan(bench, budget)
    assert all(one.level != "safe" or one.rows <= 4 for one in found.considered)


def test_a_plan_survives_a_checkpoint(bench: Bench) -> None:
    found = plan(bench, int(0.7 * plan(bench, 10**12).plain))
    assert MemoryPlan.from_numbers(found.numbers()) == found


def test_the_optimizer_is_in_the_budget(bench: Bench) -> None:
    weights = sum(p.numel() * 4 for p in bench.model.parameters() if isinstance(p, nn.Parameter))
    light = plan_memory(bench, [Way()], OptimizerCost(0.0, 0.0), budget=10**12, rows=ROWS).plain
    assert plan(bench, 10**12).plain == light + 2 * weights
    assert adamw(list(bench.model.parameters())) is not None
