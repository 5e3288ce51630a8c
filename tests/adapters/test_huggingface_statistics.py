"""What the policy sees: the gradient of the whole accumulated batch, before clipping, worked out again by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.adapters.hosts import Rows, batches, bert, plain_sums, run, trainer_for

RATE = 0.05
# Gradients as plain SGD sees them: in order, one rate, no schedule.
PLAIN: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}
# One evaluation after eight of the sixteen steps' samples: the first epoch's sums.
ONCE: dict[str, Any] = {"policy": "gradient-norm", "evaluations_per_epoch": 1}


def _scores(tmp_path: Path, model: transformers.BertForSequenceClassification, **changes: Any) -> dict[int, float]:
    outcome = run(trainer_for(tmp_path, model, **(PLAIN | changes)), **ONCE)
    first = outcome.decisions()[0]["observation"]
    return {int(block): score for block, score in first["scores"].items()}


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_statistic_is_unclipped(clip: float, tmp_path: Path) -> None:
    model = bert()
    expected = plain_sums(model, [[b] for b in batches(8)], RATE, clip)
    assert _scores(tmp_path, model, max_grad_norm=clip) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_statistic_is_that_of_the_accumulated_batch(clip: float, tmp_path: Path) -> None:
    """Four micro-batches of 4 rows count as one batch of 16."""
    model = bert()
    # BERT's loss is a mean over rows; without this the Trainer takes it for a sum over items and does not average.
    model.accepts_loss_kwargs = False
    micro = batches(4)
    groups = [micro[i : i + 4] for i in range(0, 16, 4)]
    expected = plain_sums(model, groups, RATE, clip)
    scores = _scores(tmp_path, model, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_grad_norm=clip)
    assert scores == pytest.approx(expected, rel=1e-4)


def test_statistic_of_a_short_last_group(tmp_path: Path) -> None:
    """Six micro-batches in groups of four: the second group has two, and is averaged over two."""
    model = bert()
    model.accepts_loss_kwargs = False
    rows = Rows(24)
    micro = batches(4, rows)
    expected = plain_sums(model, [micro[:4], micro[4:]], RATE)
    trainer = trainer_for(
        tmp_path, model, rows=rows, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_grad_norm=0.0,
        **PLAIN,
    )  # fmt: skip
    first = run(trainer, **ONCE).decisions()[0]["observation"]
    assert first["samples"] == 24
    assert first["interval_steps"] == 2
    assert {int(k): v for k, v in first["scores"].items()} == pytest.approx(expected, rel=1e-4)


def test_statistic_under_bf16_is_summed_in_fp32(tmp_path: Path) -> None:
    model = bert()
    expected = plain_sums(model, [[b] for b in batches(8)], RATE)
    assert _scores(tmp_path, model, bf16=True, max_grad_norm=0.0) == pytest.approx(expected, rel=0.05)


def test_every_step_is_counted_once(tmp_path: Path) -> None:
    """Clipping and the event after it both read the gradient: one of the two counts."""
    trainer = trainer_for(tmp_path, copy.deepcopy(bert()), **PLAIN)
    outcome = run(trainer, **(ONCE | {"evaluations_per_epoch": 4}))
    assert [d["observation"]["interval_steps"] for d in outcome.decisions()] == [2] * 8
