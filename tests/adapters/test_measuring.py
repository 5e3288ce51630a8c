"""What a Trainer's steps take, measured before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from frostline import BlockStack
from frostline.adapters.measuring import readable, row_seconds
from frostline.recipes.runner import build_trainer, prepare
from frostline.recipes.schema import Recipe
from tests.conftest import Stopwatch
from tests.recipes.workbench import make_data, make_model, recipe_content

TOKEN = 1e-3  # seconds


@pytest.mark.parametrize("many", [16, 4])
def test_a_further_row_is_timed_with_the_padding_that_it_brings(
    tmp_path: Path, many: int, stopwatch: Stopwatch
) -> None:
    make_model(tmp_path / "model")
    make_data(tmp_path / "data")
    recipe = Recipe.model_validate(recipe_content(tmp_path, training={"per_device_train_batch_size": 4}))
    trainer = build_trainer(recipe, prepare(recipe), tmp_path / "checkpoints")
    # One of four texts is long: batches of four hold one kind only.
    lengths = [20 if number % 4 == 0 else 2 for number in range(16)]
    trainer.train_dataset = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": 0} for n in lengths]  # type: ignore[assignment]
    model: Any = trainer.model
    stack = BlockStack.find(model)

    def slow(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        stopwatch.sleep(TOKEN * args[0].shape[0] * args[0].shape[1])

    stack.blocks[0].register_forward_hook(slow)
    found = row_seconds(trainer, "off", None, 4, many)
    data, collate = readable(trainer)

    def tokens(rows: list[int]) -> int:
        return int(collate([data[row] for row in rows])["input_ids"].numel())

    rows = [number * len(data) // many for number in range(many)]
    apart = sum(tokens(rows[first :: many // 4]) for first in range(many // 4)) / (many // 4)
    expected = TOKEN * (apart / 4 if many == 4 else (tokens(rows) - apart) / (many - 4))
    assert found == pytest.approx(expected)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
