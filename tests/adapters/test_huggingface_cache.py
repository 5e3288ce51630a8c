"""The cache under the Trainer: the losses and decisions of the uncached run, whatever the Trainer does around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import frostline
from tests.adapters.hosts import Rows, bert, trainer_for

FREEZE: dict[str, Any] = {"policy": "ramp", "start": 0.0, "level": 0.75, "evaluations_per_epoch": 4}


def run(
    folder: Path, cache: str, *, peft: bool = False, resume: str | None = None, **changes: Any
) -> tuple[list[float], Any, transformers.Trainer]:
    transformers.set_seed(3)
    model: Any = bert(dropout=0.1)
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    settings = {"num_train_epochs": 6, "logging_steps": 1, "eval_strategy": "epoch", **changes}
    trainer = trainer_for(folder, model, rows=Rows(64, ragged=True), **settings)
    frost = frostline.attach(trainer, cache=cache, **FREEZE)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return [*losses, *evaluated], frost.summary(), trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"dataloader_num_workers": 2},
        {"peft": True},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_losses_and_decisions_are_those_of_the_uncached_run(changes: dict[str, Any], tmp_path: Path) -> None:
    plain, expected, _ = run(tmp_path / "off", "off", **changes)
    ours, summary, trainer = run(tmp_path / "memory", "memory", **changes)
    assert summary["trajectory"] == expected["trajectory"]
    assert summary["final_depth"] == 3, "the last move is at the end of the run"
    assert not summary["limits"]
    cache = summary["cache"]
    assert cache["stopped"] is None
    assert cache["hits"] == 128
    assert cache["upgrades"] == 64
    assert ours == pytest.approx(plain, rel=2e-2 if "bf16" in changes else 1e-4)
    assert expected["cache"] is None
    assert not any("forward" in vars(m) for m in trainer.model.bert.modules()) if "peft" not in changes else True


def test_resumed_in_mid_epoch_it_takes_the_same_decisions(tmp_path: Path) -> None:
    """The records are gone, the line is not: samples are cached anew as they come by."""
    whole, expected, _ = run(tmp_path, "memory", save_strategy="steps", save_steps=20)
    resumed, summary, _ = run(tmp_path, "memory", save_strategy="no", resume=str(tmp_path / "checkpoint-20"))
    assert summary["trajectory"] == expected["trajectory"]
    assert summary["cache"]["hits"] > 64
    assert resumed == pytest.approx(whole, rel=1e-4)


def test_the_summary_and_the_log_say_what_was_cached(tmp_path: Path) -> None:
    _, summary, trainer = run(tmp_path, "memory")
    assert "cache: " in str(summary)
    assert torch.isfinite(next(trainer.model.parameters())).all()
