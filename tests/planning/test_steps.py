"""The profile gives back what was measured, and time goes to the part that takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frostline import BlockStack
from frostline.adapters.measuring import bench_of
from frostline.memory import MemoryModel, OptimizerCost, Way
from frostline.memory.spans import Activations, Spans
from frostline.planning import ALONE, Measured, measure_steps
from frostline.recipes.runner import build_trainer, prepare
from frostline.recipes.schema import Recipe
from frostline.simulator import Profile
from frostline.simulator.model import memory_bytes, step_time
from tests.adapters.hosts import assert_ordinary
from tests.conftest import Stopwatch
from tests.recipes.workbench import BLOCKS, recipe_content

ROWS = 4
# Of four blocks; a stem of six times the backward pass of a block.
MEASURED = Measured(
    rows=ROWS,
    batches=2,
    data=0.5,
    passes={0: 20.0, 2: 12.0, 3: 9.0},
    updates={0: 4.0, 2: 2.0, 3: 1.0},
    prefixes={2: 3.0, 3: 4.0},
    forward=(1.0,) * 6,
    backward=(6.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    spread=(15.0, 25.0),
    around=0.25,
)
NONE = (0.0,) * 6
KEPT = Spans((6.0, 10.0, 10.0, 10.0, 10.0, 2.0), NONE, NONE, NONE)
MEMORY = MemoryModel(600, [100] * 6, {Way(): Activations(Spans(NONE, NONE, NONE, NONE), KEPT)}, OptimizerCost(2.0, 0.0))


def profile(measured: Measured = MEASURED, **options: int) -> Profile:
    return measured.profile("toy", MEMORY, Way(), **options)


@pytest.mark.parametrize("depth", MEASURED.passes)
def test_at_the_measured_depths_a_step_takes_what_was_measured(depth: int) -> None:
    once = MEASURED.updates[depth] + MEASURED.around
    whole = MEASURED.passes[depth] + once + MEASURED.data
    assert step_time(profile(), ALONE, depth=depth, batch=ROWS, ranks=1).total == pytest.approx(whole)
    # Two micro-batches to an update.
    found = step_time(profile(accumulates=2), ALONE, depth=depth, batch=2 * ROWS, ranks=1)
    assert found.total == pytest.approx(2 * whole - once)


@pytest.mark.parametrize("depth", MEASURED.prefixes)
def test_a_record_saves_the_prefix(depth: int) -> None:
    skipped = sum(part.forward_seconds for part in profile().below(depth))
    found = step_time(profile(), ALONE, depth=depth, batch=ROWS, ranks=1, skipped=skipped)
    once = MEASURED.updates[depth] + MEASURED.around
    cached = MEASURED.passes[depth] - MEASURED.prefixes[depth] + once + MEASURED.data
    assert found.total == pytest.approx(cached)


def test_between_them_each_part_takes_its_share() -> None:
    # From depth 0 to 2 a pass gets 8 shorter: 6 of the stem, 1 of each block; the update 2, by bytes 2/3 of each.
    found = step_time(profile(), ALONE, depth=1, batch=ROWS, ranks=1)
    assert found.total == pytest.approx(20 - 7 + 4 - 4 / 3 + 0.5 + 0.25)


def test_noise_makes_no_part_take_less_than_nothing() -> None:
    noisy = replace(MEASURED, passes={0: 10.0, 2: 11.0, 3: 9.0}, prefixes={2: 3.0, 3: 2.0})
    seconds = [step_time(profile(noisy), ALONE, depth=k, batch=ROWS, ranks=1).total for k in range(BLOCKS)]
    assert seconds == sorted(seconds, reverse=True)


def test_ranks_wait_for_the_longest_of_their_batches() -> None:
    # Batches take 15 or 25, 20 on average; of two the longer one takes 25 in three cases of four.
    alone, two = (step_time(profile(ranks=ranks), ALONE, depth=0, batch=ROWS, ranks=1) for ranks in (1, 2))
    assert two.forward + two.backward == pytest.approx((alone.forward + alone.backward) * 22.5 / 20)
    assert two.fixed == alone.fixed


@pytest.mark.parametrize("depth", range(BLOCKS))
def test_memory_is_that_of_the_memory_model(depth: int) -> None:
    expected = MEMORY.peak(Way(), 8, depth, accumulates=True)
    assert memory_bytes(profile(), depth, 8) == expected
    # Of two micro-batches one at a time is alive.
    assert memory_bytes(profile(accumulates=2), depth, 16) == expected


def test_time_goes_to_the_block_that_takes_it(workbench: Path, stopwatch: Stopwatch) -> None:
    recipe = Recipe.model_validate(recipe_content(workbench, training={"per_device_train_batch_size": 32}))
    trainer = build_trainer(recipe, prepare(recipe), workbench / "checkpoints")
    model: Any = trainer.model
    stack = BlockStack.find(model)
    slow = stack.blocks[2].get_submodule("output.dense").register_forward_hook(lambda *_: stopwatch.sleep(0.05))
    scheduled = trainer._maybe_log_save_evaluate
    trainer._maybe_log_save_evaluate = lambda *args, **kwargs: (stopwatch.sleep(0.02), scheduled(*args, **kwargs))  # type: ignore[method-assign]
    found = measure_steps(trainer, bench_of(trainer, stack), Way())
    slow.remove()
    assert found.around == pytest.approx(0.02), "the Trainer's own work, without that of the model"
    assert (found.rows, found.batches) == (32, 3)
    assert list(found.passes.values()) == pytest.approx([0.05] * len(found.passes))
    made = found.profile("tiny", without_activations(stack), Way())
    assert [part.forward_seconds * 32 for part in made.parts] == pytest.approx([0, 0, 0, 0.05, 0, 0])
    assert [part.backward for part in made.parts] == pytest.approx([0] * 6)
    assert_ordinary(model)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def without_activations(stack: BlockStack) -> MemoryModel:
    """A memory model without measurements, whose weights are those of ``stack``."""
    owners: list[Any] = ["stem", *range(len(stack)), "head"]
    trains = [sum(4 * p.numel() for p in stack.parameters_of(owner).values()) for owner in owners]
    nothing = Spans(NONE, NONE, NONE, NONE)
    return MemoryModel(sum(trains), trains, {Way(): Activations(nothing, nothing)}, OptimizerCost(2.0, 0.0))
