"""Every sample once an epoch, in the same order, whatever the ranks and batches of a run's stages."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from frostline.packing import Order, Stage

ROWS, FIRST = 103, Stage(0, ranks=4, rows=2)  # 12 batches of 8, and 7 samples over


def dealt_out(stage: Stage, number: int, *, seed: int = 0, **settings: Any) -> list[list[list[int]]]:
    """Each rank's micro-batches, as a Trainer takes them: those before the stage's beginning are skipped."""
    dealt = []
    for rank in range(stage.ranks):
        order = Order(ROWS, FIRST.batch, stage, rank=rank, seed=seed, **settings)
        order.set_epoch(number)
        begun, steps = divmod(order.begins_at, order.steps)
        skipped = steps * stage.accumulation if begun == number else 0
        micro = list(islice(order, skipped, None))
        assert all(micro), "an empty micro-batch is to be trained on"
        assert len(micro) + skipped == len(order)
        dealt.append(micro)
    return dealt


def epoch_of(stage: Stage, number: int, **settings: Any) -> list[list[int]]:
    """The batches of all ranks together."""
    dealt, every = dealt_out(stage, number, **settings), stage.accumulation
    return [
        [row for rank in dealt for micro in rank[step : step + every] for row in micro]
        for step in range(0, len(dealt[0]), every)
    ]


@pytest.mark.parametrize(
    "stage", [FIRST, Stage(1, 2, 4), Stage(1, 1, 8), Stage(1, 2, 2, 2), Stage(1, 1, 2, 4)], ids=str
)
def test_a_batch_is_the_same_on_any_number_of_ranks(stage: Stage) -> None:
    for epoch in range(2):
        assert epoch_of(stage, epoch) == epoch_of(FIRST, epoch)


@pytest.mark.parametrize("growth", range(1, 8))
@pytest.mark.parametrize("changed_at", [8, 40, 88, 96, 104, 120])
def test_every_sample_once_an_epoch_though_the_stage_changes(growth: int, changed_at: int) -> None:
    stages = [FIRST, Stage(1, ranks=4, rows=2 * growth, samples=changed_at)]
    for epoch in range(3):
        begin, end = 96 * epoch, 96 * (epoch + 1)
        seen: list[int] = []
        if begin < changed_at:
            seen += sum(epoch_of(stages[0], epoch), [])[: changed_at - begin]
        if end > changed_at:
            seen += sum(epoch_of(stages[1], epoch), [])
        assert seen == sum(epoch_of(FIRST, epoch), [])
        assert len(seen) == 96
        assert max(Counter(seen).values()) == 1


def test_where_a_stage_begins_in_steps_of_its_own() -> None:
    # 40 samples of the second epoch are behind, 56 are left: 3 of its 4 steps of 24.
    order = Order(ROWS, FIRST.batch, Stage(1, 4, 6, samples=136), rank=0, seed=0)
    assert (order.steps, order.begins_at) == (4, 5)
    at_the_border = Order(ROWS, FIRST.batch, Stage(1, 4, 6, samples=96), rank=0, seed=0)
    assert at_the_border.begins_at == 4


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [sum(epoch_of(FIRST, epoch, seed=seed), []) for epoch in range(2) for seed in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert sum(epoch_of(FIRST, 1, shuffled=False), []) == list(range(96))


@pytest.mark.parametrize("stage", [FIRST, Stage(1, 4, 6), Stage(1, 2, 6, 2, samples=40), Stage(1, 2, 4)], ids=str)
def test_with_a_part_for_each_host_samples_stay_where_they_are(stage: Stage) -> None:
    half = stage.ranks // 2
    homes: list[set[int]] = [set(), set()]
    for epoch in range(4):
        dealt = dealt_out(stage, epoch, parts=2)
        seen = [row for rank in dealt for micro in rank for row in micro]
        assert len(set(seen)) == len(seen) == 96 - (stage.samples if epoch == 0 else 0)
        for home, ranks in zip(homes, (dealt[:half], dealt[half:]), strict=True):
            home.update(row for rank in ranks for micro in rank for row in micro)
    assert not homes[0] & homes[1]
    assert epoch_of(stage, 3, parts=2) != epoch_of(stage, 2, parts=2)
