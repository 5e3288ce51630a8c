"""What each rank of ``distributed.py`` runs: Hugging Face Trainers with Frostline, one case after the other.

Started with a folder, alone or under torchrun; it reads ``recipe.yaml`` and ``cases.json`` there (see :class:`Case`),
and every rank writes ``rank<n>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ranks import Traffic, active_bytes, counted, digest
from frostline.adapters.huggingface import Frost, attach
from frostline.recipes.runner import prepare
from frostline.recipes.schema import Recipe, load_recipe
from frostline.recipes.training import build_arguments
from frostline.tasks.classification import Prepared
from frostline.tasks.registry import TASKS

__all__ = ["BATCH", "Case"]

BATCH = 16
"""Samples in a step, of all ranks together."""


class Case(TypedDict):
    """One run.

    Attributes:
        frost: options of ``attach``.
        steps: of the run, which is one epoch.
        arguments: of the Trainer.
        counted: whether a communication hook counts bytes.
        checked_every: before one step in so many the first rank computes the loss of all ranks' samples; 0: never.
    """

    frost: dict[str, Any]
    steps: int
    arguments: dict[str, Any]
    counted: bool
    checked_every: int


class Witness(transformers.TrainerCallback):
    """Sees the steps: depth, bytes and seconds of each, and what one rank alone would have for a loss."""

    frost: Frost

    def __init__(self, trainer: transformers.Trainer, case: Case) -> None:
        self.trainer, self.case, self.traffic = trainer, case, Traffic()
        self.steps: list[dict[str, Any]] = []
        self.whole: dict[int, float] = {}
        self.cpu_seconds = self._checking = self._since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        wrapper = self.trainer.model_wrapped
        if self.case["counted"] and isinstance(wrapper, DistributedDataParallel):
            wrapper.register_comm_hook(self.traffic, counted)
        self.cpu_seconds, self._since = -time.process_time(), time.perf_counter()

    def on_step_begin(self, _: Any, state: transformers.TrainerState, *__: Any, **___: Any) -> None:
        every, step = self.case["checked_every"], state.global_step
        if every and step % every == 0 and state.is_world_process_zero:
            before = time.process_time()
            self.whole[step] = self._loss_of_all(step)
            self._checking += time.process_time() - before

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        active = active_bytes(self.trainer.model)
        self.steps.append({"depth": self.frost.depth, "active": active, "sent": self.traffic.taken()})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.steps[-1]["seconds"], self._since = now - self._since, now

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.cpu_seconds += time.process_time() - self._checking

    def _loss_of_all(self, step: int) -> float:
        trainer = self.trainer
        rows = [trainer.train_dataset[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        with torch.no_grad():
            return float(trainer.model(**trainer.data_collator(rows)).loss)


def run(recipe: Recipe, data: Prepared, case: Case, folder: Path) -> dict[str, Any]:
    """What this rank saw of ``case``; the same samples in the same order on any number of ranks."""
    transformers.set_seed(recipe.seed)
    model = TASKS[recipe.task].build_model(data, recipe.model, recipe.seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # A classifier's loss is a mean over rows; without this the Trainer takes it for a sum and adds up the ranks.
    model.accepts_loss_kwargs = False
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    settings = {
        **recipe.training, "num_train_epochs": 1, "per_device_train_batch_size": BATCH // _ranks(), "use_cpu": True,
        "train_sampling_strategy": "sequential", "eval_strategy": "no", "save_strategy": "no", **case["arguments"],
    }  # fmt: skip
    trainer = transformers.Trainer(
        model,
        build_arguments(settings, folder, seed=recipe.seed),
        train_dataset=data.train.select([order[i % len(order)] for i in range(case["steps"] * BATCH)]),
        data_collator=data.collator,
    )
    witness = Witness(trainer, case)
    trainer.add_callback(witness)
    witness.frost = attach(trainer, **case["frost"])
    trainer.train()
    summary = witness.frost.summary()
    return {
        "steps": witness.steps,
        # Means over all ranks.
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "whole": witness.whole,
        "decisions": [{**e, "time": None} for e in witness.frost.log.events if e["event"] == "decision"],
        "moves": [(move["step"], move["depth"]) for move in summary["trajectory"]],
        "limits": summary["limits"],
        "weights": digest(trainer.model),
        "cpu_seconds": witness.cpu_seconds,
    }


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    cases: dict[str, Case] = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    data = prepare(recipe)
    found = {name: run(recipe, data, case, folder / "runs") for name, case in cases.items()}
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
