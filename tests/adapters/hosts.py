"""What the adapter tests share: a tiny BERT, its data, a Trainer around it, and a witness of every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import frostline
from frostline.adapters.huggingface import Frost

VOCABULARY, LABELS, BLOCKS = 64, 3, 4

# Moves the line four times over a run, by the clock alone: what a test of everything else needs.
RAMP: dict[str, Any] = {"policy": "ramp", "start": 0.0, "level": 0.75, "evaluations_per_epoch": 4}


def bert(dropout: float = 0.0, seed: int = 0, **options: Any) -> transformers.BertForSequenceClassification:
    """Four blocks of width 32. Without dropout every host computes the same numbers."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "num_labels": LABELS,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**(settings | options)))


class Rows(Dataset[dict[str, Tensor]]):
    """``count`` rows of token ids, the longest ``length`` tokens; with ``ragged`` each has its own length."""

    def __init__(self, count: int = 64, length: int = 8, *, ragged: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items: list[dict[str, Tensor]] = []
        for _ in range(count):
            size = int(torch.randint(3, length + 1, (), generator=generator)) if ragged else length
            ids = torch.randint(3, VOCABULARY, (size,), generator=generator)
            self.items.append({"input_ids": ids, "labels": ids[0] % LABELS})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same rows without a length."""

    def __init__(self, count: int = 64) -> None:
        self.rows = Rows(count)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows.items)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest row of the batch."""
    ids = nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([r["labels"] for r in rows])}


def batches(size: int, rows: Rows | None = None) -> list[dict[str, Tensor]]:
    """The rows in order, ``size`` at a time: what a sequential sampler gives."""
    items = (rows or Rows()).items
    return [collate(items[i : i + size]) for i in range(0, len(items), size)]


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """Two epochs of eight steps on the CPU, quiet; everything else is transformers' default."""
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 5,
    }
    return transformers.TrainingArguments(str(folder), **(settings | changes))


class Witness(transformers.TrainerCallback):
    """Holds every step to law 1: no frozen bit moves, no frozen gradient appears, what is active trains."""

    def __init__(self) -> None:
        self.frozen: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad or parameter.grad is None, f"{name} is frozen and has a gradient"

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        # Frostline decides at the end of a step too, and before this callback: look at what was frozen during it.
        if self._still is not None:
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, self._before[n])}
            assert not moved & self._still, f"frozen parameters moved: {sorted(moved & self._still)}"
            assert moved, "nothing trained"
            self.frozen.append(len(self._still))

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._still: set[str] | None = {n for n, p in model.named_parameters() if not p.requires_grad}


@dataclass
class Outcome:
    """A finished run."""

    trainer: transformers.Trainer
    frost: Frost
    witness: Witness
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def moves(self) -> list[tuple[int, int]]:
        """``(step, depth)`` of every move of the frost line."""
        return [(m["step"], m["depth"]) for m in self.frost.summary()["trajectory"]]

    def decisions(self) -> list[dict[str, Any]]:
        """The ``decision`` events."""
        return [e for e in self.events if e["event"] == "decision"]

    def limits(self) -> set[str]:
        """The codes of the ``limit`` events."""
        return {e["code"] for e in self.events if e["event"] == "limit"}


def trainer_for(
    folder: Path,
    model: nn.Module | None = None,
    *,
    rows: Any = None,
    kind: type[transformers.Trainer] = transformers.Trainer,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> transformers.Trainer:
    """A Trainer with ``changes`` to its arguments and ``extra`` arguments of its own."""
    extra = dict(extra or {})
    if "model_init" not in extra:
        extra["model"] = model if model is not None else bert(dropout=0.1)
    return kind(
        args=arguments(folder, **changes),
        train_dataset=rows if rows is not None else Rows(),
        eval_dataset=Rows(16, seed=1),
        data_collator=collate,
        **extra,
    )


def run(trainer: transformers.Trainer, **options: Any) -> Outcome:
    """Attach, train, and check what must hold after any run."""
    required = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    frost = frostline.attach(trainer, **(options or RAMP))
    witness = Witness()
    trainer.add_callback(witness)
    trainer.train()
    assert_ordinary(trainer.model)
    assert {n: p.requires_grad for n, p in trainer.model.named_parameters()} == required
    return Outcome(trainer, frost, witness, frost.log.events)


def assert_ordinary(model: nn.Module) -> None:
    """Nothing of Frostline hangs on ``model``: no pin, no hook."""
    for name, module in model.named_modules():
        assert "train" not in vars(module), f"{name}.train is still pinned"
        for key, hooks in vars(module).items():
            if "hook" in key and isinstance(hooks, dict):
                left = [h for h in hooks.values() if getattr(h, "__module__", "").startswith("frostline")]
                assert not left, f"{name}.{key} still has {left}"


def plain_sums(
    model: nn.Module, groups: list[list[dict[str, Tensor]]], rate: float, clip: float | None = None
) -> dict[int, float]:
    """Algorithm 1's numbers by hand: L1 norm per block of the summed gradients of SGD steps.

    Args:
        model: left untouched.
        groups: one entry per optimizer step; its micro-batches are joined to one batch.
        rate: learning rate of plain SGD.
        clip: maximal norm of the gradient that the step uses; the sum takes the unclipped one.
    """
    model = copy.deepcopy(model).train()
    sums: dict[str, np.ndarray] = {}
    for group in groups:
        batch = {key: torch.cat([b[key] for b in group]) for key in group[0]}
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if ".layer." in name:
                sums[name] = sums.get(name, 0.0) + parameter.grad.double().numpy()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    totals = dict.fromkeys(range(BLOCKS), 0.0)
    for name, value in sums.items():
        totals[int(name.split(".layer.")[1].split(".")[0])] += float(np.abs(value).sum())
    return totals
