"""What each rank of ``test_trainer.py`` runs: unmodified Trainers under DistributedDataParallel, one after the other.

Start it with ``torchrun --nproc-per-node=2``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

import frostline
from tests.adapters.hosts import RAMP, Witness, bert, trainer_for
from tests.distributed.traffic import Traffic, active_bytes, counted, digest

# ``frost``: what is attached; the rest are arguments of the Trainer. None is transformers' own choice: True, but with
# gradient checkpointing False.
CASES: dict[str, dict[str, Any]] = {
    "explicit": {"ddp_find_unused_parameters": False},
    "default": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulating": {"ddp_find_unused_parameters": False, "accumulate": 2},
    "cached": {"ddp_find_unused_parameters": False, "frost": {**RAMP, "cache": "memory"}},
    "initial": {"ddp_find_unused_parameters": False, "frost": {"policy": "static", "depth": 2}},
    "saved": {"ddp_find_unused_parameters": False, "save_strategy": "steps", "save_steps": 8},
}


class Count(transformers.TrainerCallback):
    """Counts what DDP sends, with a communication hook on the wrapper that the Trainer holds."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer, self.traffic = trainer, Traffic()
        self.steps: list[dict[str, int]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.wrapper = self.trainer.model_wrapped
        assert isinstance(self.wrapper, DistributedDataParallel), "the test shows nothing without DDP"
        self.wrapper.register_comm_hook(self.traffic, counted)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps.append({"active": active_bytes(self.wrapper), "sent": self.traffic.taken()})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer.model_wrapped is self.wrapper, "the Trainer's wrapper is another one"


def _train(
    folder: Path, *, frost: dict[str, Any] = RAMP, accumulate: int = 1, resume: Path | None = None, **changes: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = bert()
    model.accepts_loss_kwargs = False
    trainer = trainer_for(
        folder, model, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential", weight_decay=0.1, logging_steps=1, **changes,
    )  # fmt: skip
    count, witness = Count(trainer), Witness()
    trainer.add_callback(count)
    handle = frostline.attach(trainer, **frost)
    trainer.add_callback(witness)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    cache = handle.summary()["cache"] or {"hits": 0, "upgrades": 0}
    return {
        "steps": count.steps,
        "read": cache["hits"] + cache["upgrades"],
        "limits": handle.summary()["limits"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": digest(trainer.model),
    }


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    found = {name: _train(folder / name, **case) for name, case in CASES.items()}
    found["resumed"] = _train(folder / "resumed", resume=folder / "saved" / "checkpoint-8", **CASES["explicit"])
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
