"""``attach`` under ``torch_compile``: one graph more per move of the frost line, and a bound on the moves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

import frostline
from tests.adapters.hosts import LABELS, RAMP, VOCABULARY, bert, run, trainer_for


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.linear(x).relu(), 0.1, self.training)


class _Network(nn.Module):
    """Nine blocks that compile in no time; what its inputs are shows only when the first batch comes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.cells = nn.ModuleList(_Cell() for _ in range(9))
        self.head = nn.Linear(8, LABELS)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        for cell in self.cells:
            x = cell(x)
        logits = self.head(x.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")  # TrainingArguments sets them for good
        monkeypatch.delenv(name)
    # Thousands of records a graph, which pytest would format and keep.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _graphs(trainer: transformers.Trainer) -> list[int]:
    """Filled with the number of graphs compiled so far, at the end of every step."""
    seen: list[int] = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(counters["stats"]["unique_graphs"])

    trainer.add_callback(Count())
    return seen


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_costs_one_graph_per_move(tmp_path: Path) -> None:
    model = bert(dropout=0.1, num_hidden_layers=2)
    trainer = trainer_for(tmp_path, model, torch_compile=True, torch_compile_backend="aot_eager", max_steps=7)
    graphs = _graphs(trainer)
    outcome = run(trainer, policy="ramp", start=0.5, level=1.0, evaluations_per_epoch=4)
    assert outcome.moves == [(6, 1)]
    assert graphs[0] > 0, "nothing was compiled"
    # transformers compiles BERT once more at its second step, with or without us.
    assert graphs[5] == graphs[1], f"a graph without a move: {graphs}"
    assert graphs[6] == graphs[5] + 1, f"the first step at depth 1: {graphs}"
    assert outcome.witness.frozen == [0] * 6 + [21]


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_model_moves_six_times_at_most(tmp_path: Path) -> None:
    ramp: dict[str, Any] = {"policy": "ramp", "start": 0.0, "level": 1.0, "evaluations_per_epoch": 8}
    trainer = trainer_for(
        tmp_path, _Network(), num_train_epochs=1, torch_compile=True, torch_compile_backend="aot_eager"
    )
    graphs = _graphs(trainer)
    outcome = run(trainer, **ramp)
    assert outcome.moves == [(step, step) for step in range(1, 7)]
    assert graphs == [1, 2, 3, 4, 5, 6, 7, 7]
    assert not counters["graph_break"]
    assert outcome.limits() == {"depth-changes"}
    assert outcome.frost.summary()["final_depth"] == 6
    assert [e["applied"] for e in outcome.decisions()] == [True] * 6 + [False] * 2


def test_eager_model_moves_as_often_as_it_likes(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, _Network(), num_train_epochs=1)
    outcome = run(trainer, policy="ramp", start=0.0, level=1.0, evaluations_per_epoch=8)
    assert outcome.moves == [(step, step) for step in range(1, 9)]


def test_bound_on_moves_can_be_set(tmp_path: Path) -> None:
    outcome = run(trainer_for(tmp_path), **RAMP, max_depth_changes=1)
    assert outcome.moves == [(6, 1)]
    assert outcome.limits() == {"depth-changes"}


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_reads_from_the_cache(tmp_path: Path) -> None:
    found = []
    for cache in ("off", "memory"):
        torch._dynamo.reset()
        counters.clear()
        transformers.set_seed(0)
        trainer = trainer_for(
            tmp_path, bert(dropout=0.1, num_hidden_layers=2), torch_compile=True, torch_compile_backend="aot_eager",
            num_train_epochs=3, logging_steps=1,
        )  # fmt: skip
        graphs = _graphs(trainer)
        frost = frostline.attach(trainer, "static", cache, depth=1)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, frost.summary(), graphs[-1]))
    (expected, _, plain), (losses, summary, ours) = found
    assert losses == pytest.approx(expected, rel=1e-4)
    assert not summary["limits"]
    assert summary["cache"]["hits"] == 2 * summary["cache"]["misses"] > 0
    assert ours <= plain + 1, "skipping compiles once, not at every step"
