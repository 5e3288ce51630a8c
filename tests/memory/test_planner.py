"""A budget is met by the fastest way that fits, or refused with the least that would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frostline import BlockStack
from frostline.errors import ConfigError
from frostline.memory import Bench, MemoryPlan, OptimizerCost, Way, candidates, plan_memory
from frostline.memory.planner import _readable
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
        ConfigError, match=r"memory.budget=[\d.]+ MiB cannot be met: a step takes at least ([\d.]+) MiB"
    ) as said:
        plan(bench, 2 * weights)
    least = float(str(said.value).split("at least ")[1].split(" ")[0])
    # Half a per cent more for what rounding takes away, and five for the model's error.
    assert plan(bench, int(least * 2**20 * 1.055)).changes


@pytest.mark.parametrize(
    ("ways", "advice"),
    [
        (candidates("slimfit", checkpoints=True), "a larger budget, a stronger level, or a policy that freezes more"),
        (candidates("published", checkpoints=True), "a larger budget, a stronger level, or a policy that freezes more"),
        (candidates("max", checkpoints=True), "a larger budget, or a policy that freezes more"),
        ([Way(checkpointing=True)], "a larger budget, or a policy that freezes more"),
    ],
)
def test_a_stronger_level_is_advised_where_there_is_one(bench: Bench, ways: list[Way], advice: str) -> None:
    with pytest.raises(ConfigError, match=f"choose {advice}$"):
        plan(bench, 1000, ways)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1023, "0.999 KiB"),
        (10**6, "977 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (1.02 * 2**20, "1.02 MiB"),
        (6e9, "5.59 GiB"),
        (6 * 2**30, "6 GiB"),
        (5000 * 2**40, "5000 TiB"),
        (float("inf"), "more than the device has"),
    ],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert _readable(nbytes) == text


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
