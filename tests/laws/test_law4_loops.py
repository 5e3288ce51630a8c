"""Law 4 in a plain loop, under Accelerate and under Lightning: resumed in mid-epoch or at its end, bit for bit.

The Hugging Face Trainer, and processes that are killed, are in ``tests/faults``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import frostline
from frostline.adapters.lightning import FrostlineCallback
from frostline.events import EventLog
from tests.faults.child import build_model, collate, rows

BATCH, STEPS_PER_EPOCH, EPOCHS = 8, 12, 3
STEPS = STEPS_PER_EPOCH * EPOCHS
DATA = rows(BATCH * STEPS_PER_EPOCH, 5)
POLICY: dict[str, Any] = {"policy": "gradient-norm", "percentile": 50, "evaluations_per_epoch": 4}
STOPS = [STEPS_PER_EPOCH + 4, 2 * STEPS_PER_EPOCH]  # between two decisions (one each 3 steps), and at an epoch's end


def batch(step: int) -> dict[str, Tensor]:
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(step // STEPS_PER_EPOCH))
    start = step % STEPS_PER_EPOCH * BATCH
    return collate([DATA[i] for i in order[start : start + BATCH]])


@dataclass
class Outcome:
    """What two runs must share."""

    weights: dict[str, Tensor]
    summary: dict[str, Any]
    decisions: list[dict[str, Any]]
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, summary: dict[str, Any], log: EventLog, losses: list[float]) -> Outcome:
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        decisions = [
            {k: v for k, v in event.items() if k != "time"} for event in log.events if event["event"] == "decision"
        ]
        return cls(weights, {k: v for k, v in summary.items() if k != "seconds"}, decisions, losses)

    def assert_equal(self, other: Outcome) -> None:
        assert self.summary["final_depth"] >= 2
        assert len(self.summary["trajectory"]) >= 2
        assert other.summary == self.summary
        assert other.decisions == self.decisions
        assert other.losses == self.losses
        different = [name for name, value in self.weights.items() if not torch.equal(other.weights[name], value)]
        assert not different


class Plain:
    """A loop of one's own: saves with ``state_dict()``, as one saves the model's and the optimizer's."""

    def __init__(self) -> None:
        torch.manual_seed(11)
        self.log = EventLog()
        self.model = build_model().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.prepare()
        self.frost = frostline.Frostline(
            self.model, self.optimizer, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS, batch_size=BATCH,
            events=self.log, **POLICY,
        )  # fmt: skip

    def prepare(self) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def train(self, start: int, end: int) -> None:
        for step in range(start, end):
            loss = self.model(**batch(step)).loss
            self.backward(loss)
            self.frost.before_step()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.frost.after_step()
            self.losses.append(float(loss.detach()))

    def save(self, folder: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "frost": self.frost.state_dict(),
            "events": self.log.events,
        }
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        # weights_only: what Frostline gives is tensors and plain values.
        state = torch.load(folder / "state.pt", weights_only=True)
        self.log.events[:] = state["events"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.load_frost(state["frost"], folder)

    def load_frost(self, saved: dict[str, Any], folder: Path) -> None:
        self.frost.load_state_dict(saved)

    def outcome(self) -> Outcome:
        summary = dict(self.frost.summary())
        self.frost.finish()
        return Outcome.of(self.model, summary, self.log, self.losses)


class WithFiles(Plain):
    """The same with ``Frostline.save`` and ``load``: JSON and safetensors beside one's own files."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.frost.save(folder)

    def load_frost(self, saved: dict[str, Any], folder: Path) -> None:
        self.frost.load(folder)


class Forgetful(Plain):
    """Restores all but Frostline's state, as without the feature."""

    def load_frost(self, saved: dict[str, Any], folder: Path) -> None:
        pass


class WithAccelerate(Plain):
    """``register_for_checkpointing``, ``save_state`` and ``load_state``."""

    def prepare(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def save(self, folder: Path) -> None:
        self.accelerator.register_for_checkpointing(self.frost)
        self.accelerator.save_state(str(folder / "accelerate"))
        torch.save(self.log.events, folder / "events.pt")

    def load(self, folder: Path) -> None:
        self.log.events[:] = torch.load(folder / "events.pt", weights_only=True)
        self.accelerator.register_for_checkpointing(self.frost)
        self.accelerator.load_state(str(folder / "accelerate"))


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", [Plain, WithFiles, WithAccelerate])
def test_a_loop_resumes_exactly(kind: type[Plain], stop: int, tmp_path: Path) -> None:
    whole = kind()
    whole.train(0, STEPS)
    first = kind()
    first.train(0, stop)
    first.save(tmp_path)
    first.train(stop, stop + 3)  # what comes after the checkpoint is lost
    second = kind()
    second.load(tmp_path)
    assert second.frost.depth > 0
    second.losses = first.losses[:stop]
    second.train(stop, STEPS)
    whole.outcome().assert_equal(second.outcome())


def test_without_our_state_a_loop_ends_differently(tmp_path: Path) -> None:
    whole, first, second = Plain(), Plain(), Forgetful()
    first.train(0, STOPS[0])
    first.save(tmp_path)
    second.load(tmp_path)
    second.losses = list(first.losses)
    second.train(STOPS[0], STEPS)
    whole.train(0, STEPS)
    with pytest.raises(AssertionError):
        whole.outcome().assert_equal(second.outcome())


class Module(pl.LightningModule):
    """The same model and data; dropout is drawn from the step, since Lightning's checkpoints hold no random state."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.model = build_model()
        self.losses = losses

    def training_step(self, numbers: list[int], index: int) -> Tensor:
        step = self.global_step
        torch.manual_seed(step)
        loss: Tensor = self.model(**batch(step)).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(STEPS_PER_EPOCH * BATCH), batch_size=BATCH)  # type: ignore[arg-type]


class Stop(pl.Callback):
    """Saves after a step and stops three steps later."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
        trainer.should_stop = trainer.global_step >= self.step + 3


def lightning(log: EventLog, losses: list[float], stop: pl.Callback | None = None, path: Path | None = None) -> Outcome:
    module, callback = Module(losses), FrostlineCallback(events=log, **POLICY)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, callbacks=[callback, stop] if stop else [callback],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=path, weights_only=False if path else None)
    return Outcome.of(module, dict(callback.summary()), log, losses)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", STOPS)
def test_lightning_resumes_exactly(stop: int, tmp_path: Path) -> None:
    checkpoint, log, losses = tmp_path / "a.ckpt", EventLog(), list[float]()
    whole = lightning(EventLog(), [])
    lightning(log, losses, Stop(stop, checkpoint))
    assert len(losses) == stop + 3
    again = lightning(log, losses[:stop], path=checkpoint)
    whole.assert_equal(again)
