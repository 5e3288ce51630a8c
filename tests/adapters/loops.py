"""The same training, sixteen steps of plain SGD over the same batches, in each of the four hosts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import frostline
from frostline.adapters.lightning import FrostlineCallback
from frostline.events import EventLog
from tests.adapters.hosts import Rows, batches, collate, run, trainer_for

RATE = 0.05
PLAN: dict[str, Any] = {"steps_per_epoch": 8, "epochs": 2, "batch_size": 8, "samples_per_epoch": 64}

Result = tuple[list[dict[str, Any]], dict[str, Tensor]]


def decisions(log: EventLog) -> list[dict[str, Any]]:
    """The ``decision`` events without the clock."""
    return [{k: v for k, v in e.items() if k != "time"} for e in log.events if e["event"] == "decision"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def plain(model: nn.Module, folder: Path, **options: Any) -> Result:
    """A loop written by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    frost = frostline.Frostline(model, optimizer, **PLAN, **options)
    for _ in range(2):
        for batch in batches(8):
            model.train()
            model(**batch).loss.backward()
            frost.before_step()
            optimizer.step()
            optimizer.zero_grad()
            frost.after_step()
    frost.finish()
    return decisions(frost.log), weights(model)


def accelerated(model: nn.Module, folder: Path, **options: Any) -> Result:
    """A loop over what ``Accelerator.prepare`` gives, with its ``accumulate``."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=RATE), DataLoader(Rows(), 8, collate_fn=collate)
    )
    frost = frostline.Frostline(model, optimizer, **PLAN, **options)
    accelerator.register_for_checkpointing(frost)
    for _ in range(2):
        for batch in loader:
            model.train()
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    frost.before_step()
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    frost.after_step()
    frost.finish()
    return decisions(frost.log), weights(accelerator.unwrap_model(model))


def hugging_face(model: nn.Module, folder: Path, **options: Any) -> Result:
    """The Trainer, in order, without schedule and clipping."""
    trainer = trainer_for(
        folder, model, optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    outcome = run(trainer, **options)
    return decisions(outcome.frost.log), weights(model)


class Module(pl.LightningModule):
    """A network in a LightningModule. ``validation_step`` makes Lightning switch to eval mode and back."""

    def __init__(self, network: nn.Module, rate: float = RATE, momentum: float = 0.0) -> None:
        super().__init__()
        self.network, self.rate, self.momentum = network, rate, momentum

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.network(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("loss", self.network(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=self.momentum)


def lightning_trainer(folder: Path, *callbacks: pl.Callback, **changes: Any) -> pl.Trainer:
    """Two epochs on the CPU, quiet."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **(settings | changes))


def loader(rows: Any = None, size: int = 8) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(rows if rows is not None else Rows(), size, collate_fn=collate)


def in_lightning(model: nn.Module, folder: Path, **options: Any) -> Result:
    """Lightning, with a validation after every epoch."""
    callback = FrostlineCallback(**options)
    model.train()
    lightning_trainer(folder, callback).fit(Module(model), loader(), loader(Rows(16, seed=1)))
    # Paths of resting modules start at the LightningModule.
    found = copy.deepcopy(decisions(callback._log))
    for event in found:
        event["resting"] = [path.removeprefix("network.") for path in event["resting"]]
    return found, weights(model)
