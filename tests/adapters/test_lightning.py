"""``FrostlineCallback`` in a real Lightning Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from frostline.adapters.lightning import FrostlineCallback
from frostline.errors import ConfigError, FrostlineError, ModelError, ResumeError
from tests.adapters.hosts import RAMP, Rows, Stream, assert_ordinary, batches, bert, collate, plain_sums
from tests.adapters.loops import RATE, Module, decisions, lightning_trainer, loader, weights

ONCE: dict[str, Any] = {"policy": "gradient-norm", "evaluations_per_epoch": 1}
MOVES = [(6, 1), (12, 2), (16, 3)]


def _moves(callback: FrostlineCallback) -> list[tuple[int, int]]:
    return [(m["step"], m["depth"]) for m in callback.summary()["trajectory"]]


class Witness(pl.Callback):
    """Holds every step to law 1; runs before Frostline's own ``on_train_batch_end`` when it comes first."""

    def __init__(self) -> None:
        self.frozen: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self._before = weights(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        still = {n for n, p in module.named_parameters() if not p.requires_grad}
        moved = {n for n, p in module.named_parameters() if not torch.equal(p, self._before[n])}
        assert not moved & still
        assert all(p.grad is None for n, p in module.named_parameters() if n in still)
        self.frozen.append(len(still))


def _fit(folder: Path, callback: FrostlineCallback, module: Module | None = None, **changes: Any) -> Module:
    module = (module or Module(bert(dropout=0.1), momentum=0.9)).train()
    witness = Witness()
    trainer = lightning_trainer(folder, witness, callback, **changes)
    trainer.fit(module, loader(), loader(Rows(16, seed=1)))
    assert_ordinary(module)
    assert all(p.requires_grad for p in module.parameters())
    assert all(m.training for m in module.network.modules())
    callback.witness = witness  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_clip_val": 1e-3},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 3},
        {"num_sanity_val_steps": 0, "limit_val_batches": 0},
        {"max_epochs": -1, "max_steps": 16},
    ],
    ids=str,
)
def test_setting(changes: dict[str, Any], tmp_path: Path) -> None:
    callback = FrostlineCallback(**RAMP)
    _fit(tmp_path, callback, **changes)
    assert _moves(callback) == MOVES
    assert callback.witness.frozen == [0] * 6 + [21] * 6 + [37] * 4  # type: ignore[attr-defined]
    assert callback.summary()["samples"] == 128


def test_gradient_accumulation(tmp_path: Path) -> None:
    callback = FrostlineCallback(**RAMP)
    _fit(tmp_path, callback, accumulate_grad_batches=3)
    assert callback.summary()["steps"] == 6
    assert _moves(callback) == [(2, 1), (4, 2), (6, 3)]


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_statistic_is_that_of_the_whole_unclipped_batch(clip: float | None, tmp_path: Path) -> None:
    network = bert()
    micro = batches(4)
    expected = plain_sums(network, [micro[i : i + 2] for i in range(0, 16, 2)], RATE, clip)
    callback = FrostlineCallback(**ONCE)
    trainer = lightning_trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=clip)
    trainer.fit(Module(network).train(), loader(size=4))
    scores = decisions(callback._log)[0]["observation"]["scores"]
    assert {int(k): v for k, v in scores.items()} == pytest.approx(expected, rel=1e-4)


def test_steps_that_the_scaler_skips_are_left_out(tmp_path: Path) -> None:
    """A loss scale that overflows fp16 at first: the sum holds finite, unscaled gradients of the other steps only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15)
    callback = FrostlineCallback(**ONCE)
    network = bert()
    trainer = lightning_trainer(
        tmp_path, callback, max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    )
    trainer.fit(Module(network).train(), loader())
    assert scaler.get_scale() < 2.0**40, "nothing overflowed: the test shows nothing"
    seen = decisions(callback._log)[0]["observation"]
    assert seen["step"] == 8
    assert 0 < seen["interval_steps"] < 8
    whole = plain_sums(bert(), [[b] for b in batches(8)], RATE)
    for block, score in seen["scores"].items():
        assert math.isfinite(score)
        assert 0.3 * whole[int(block)] < score < 1.5 * whole[int(block)]


def test_loader_without_a_length(tmp_path: Path) -> None:
    callback = FrostlineCallback(**RAMP)
    module = Module(bert(dropout=0.1)).train()
    lightning_trainer(tmp_path, callback, max_epochs=-1, max_steps=8).fit(module, loader(Stream()))
    assert _moves(callback) == [(4, 1), (6, 2), (8, 3)]
    with pytest.raises(ConfigError, match="length of the run is unknown"):
        lightning_trainer(tmp_path, FrostlineCallback(**RAMP), max_epochs=2).fit(module, loader(Stream()))


def test_compiled_module_moves_six_times_at_most(tmp_path: Path) -> None:
    network = bert(dropout=0.1, num_hidden_layers=9)
    module = Module(network).train()
    module._compiler_ctx = {"compiler": "dynamo"}  # what torch.compile(module) leaves, without the minute it takes
    ramp: dict[str, Any] = {"policy": "ramp", "start": 0.0, "level": 1.0, "evaluations_per_epoch": 8}
    callback = FrostlineCallback(**ramp)
    lightning_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert [depth for _, depth in _moves(callback)] == [1, 2, 3, 4, 5, 6]
    callback = FrostlineCallback(max_depth_changes=2, **ramp)
    lightning_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert [depth for _, depth in _moves(callback)] == [1, 2]


# -- more than one run -------------------------------------------------------------------------------


class Resumable(DataLoader[dict[str, Tensor]]):
    """A loader that goes on where a checkpoint was written; without it Lightning begins the epoch's data again."""

    given = 0

    def __init__(self) -> None:
        super().__init__(Rows(), 8, collate_fn=collate)

    def __iter__(self) -> Any:
        self.given %= len(self)
        for batch in list(super().__iter__())[self.given :]:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


@pytest.mark.parametrize("options", [RAMP, {"policy": "gradient-norm", "evaluations_per_epoch": 4, "percentile": 100}])
@pytest.mark.parametrize("step", [5, 8, 13])
def test_resume_is_exact(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    """Stop after ``step`` of 16 steps, in the middle of an interval or at its end, and go on in fresh objects."""
    whole = FrostlineCallback(**options)
    expected = Module(bert(), momentum=0.9).train()
    lightning_trainer(tmp_path, whole).fit(expected, Resumable())
    assert whole.summary()["final_depth"] > 0, "nothing froze: the test shows nothing"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    first = FrostlineCallback(**options)
    lightning_trainer(tmp_path, first, Save()).fit(Module(bert(), momentum=0.9).train(), Resumable())
    second = FrostlineCallback(**options)
    module = Module(bert(seed=1), momentum=0.9).train()
    lightning_trainer(tmp_path, second).fit(module, Resumable(), ckpt_path=tmp_path / "stopped.ckpt")
    timeless = [{k: v for k, v in c.summary().items() if k != "seconds"} for c in (whole, second)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(module).items())
    late = [d for d in decisions(whole._log) if d["step"] > step]
    assert decisions(second._log) == late


def test_training_on_from_a_checkpoint_of_the_finished_run(tmp_path: Path) -> None:
    first = FrostlineCallback(policy="static", depth=2)
    trainer = lightning_trainer(tmp_path, first)
    trainer.fit(Module(bert()).train(), loader())
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    second = FrostlineCallback(policy="static", depth=2)
    longer = lightning_trainer(tmp_path, Witness(), second, max_epochs=3)
    longer.fit(Module(bert()).train(), loader(), ckpt_path=tmp_path / "done.ckpt")
    assert second.summary()["steps"] == 24
    assert second.summary()["final_depth"] == 2


def test_checkpoint_of_another_policy(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path, FrostlineCallback(policy="static", depth=2), max_epochs=1)
    trainer.fit(Module(bert()).train(), loader())
    trainer.save_checkpoint(tmp_path / "static.ckpt")
    other = lightning_trainer(tmp_path, FrostlineCallback(policy="static", depth=1))
    with pytest.raises(ResumeError, match="made with policy static"):
        other.fit(Module(bert()).train(), loader(), ckpt_path=tmp_path / "static.ckpt")


def test_second_fit_starts_thawed(tmp_path: Path) -> None:
    callback = FrostlineCallback(**RAMP)
    module = _fit(tmp_path, callback)
    _fit(tmp_path, callback, module)
    assert _moves(callback) == MOVES
    assert callback.summary()["steps"] == 16


def test_a_failed_fit_leaves_an_ordinary_module(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 13:
                raise ValueError("the data ran out")

    callback = FrostlineCallback(**RAMP)
    module = Module(bert()).train()
    with pytest.raises(ValueError, match="the data ran out"):
        lightning_trainer(tmp_path, callback, Fail()).fit(module, loader())
    assert callback.summary()["final_depth"] == 2
    assert_ordinary(module)
    assert all(p.requires_grad for p in module.parameters())


def test_policy_none_is_bit_identical(tmp_path: Path) -> None:
    plain, ours = (Module(bert()).train() for _ in range(2))
    lightning_trainer(tmp_path).fit(plain, loader())
    callback = FrostlineCallback(policy="none")
    lightning_trainer(tmp_path, callback).fit(ours, loader())
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(ours).items())
    assert callback.summary()["steps"] == 16
    assert callback.summary()["trajectory"] == []


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "gradnorm"}, "did you mean 'gradient-norm'"),
        ({"percentile": 101}, "percentile=101"),
        ({"percentil": 50}, "did you mean 'percentile'"),
        ({"cache": "gpu"}, "unknown cache mode 'gpu'"),
        ({"memory": {"budget": "1GiB"}}, "needs a Hugging Face Trainer or a recipe; here set memory='slimfit'"),
        ({"memroy": "max"}, "did you mean 'memory'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FrostlineCallback(**options)


def test_summary_before_training() -> None:
    with pytest.raises(FrostlineError, match=r"call trainer.fit\(\) first"):
        FrostlineCallback().summary()


def test_two_optimizers(tmp_path: Path) -> None:
    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

        def training_step(self, batch: dict[str, Tensor], _: int) -> None:
            raise AssertionError("never reached")

    module = Two(bert())
    module.automatic_optimization = False
    with pytest.raises(ModelError, match="2 optimizers"):
        lightning_trainer(tmp_path, FrostlineCallback()).fit(module, loader())


def test_sharded_strategy(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path)
    callback = FrostlineCallback()
    trainer._accelerator_connector.strategy = FSDPStrategy(accelerator=trainer.accelerator)
    with pytest.raises(ModelError, match="FSDPStrategy cannot change what is frozen"):
        callback.setup(trainer, Module(bert()), "fit")


@pytest.fixture
def _distributed_by_itself() -> Iterator[None]:
    """Lightning leaves the rank and address of its process group in the environment."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_distributed_by_itself")
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("options", [RAMP, {"policy": "interlayer"}], ids=lambda options: options["policy"])
def test_ddp(options: dict[str, Any], unused: bool, tmp_path: Path) -> None:
    """One process is enough: the wrapper is a real DistributedDataParallel."""
    callback = FrostlineCallback(**options)
    strategy = DDPStrategy(
        find_unused_parameters=unused, process_group_backend="gloo", accelerator=None, parallel_devices=None
    )
    trainer = lightning_trainer(tmp_path, callback, strategy=strategy, devices=1)
    module = Module(bert(dropout=0.1)).train()
    if unused or options is RAMP:
        trainer.fit(module, loader())
        assert _moves(callback) == (MOVES if options is RAMP else [])
        return
    with pytest.raises(ModelError, match="find_unused_parameters=True"):
        trainer.fit(module, loader())
