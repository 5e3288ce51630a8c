"""Laws 1 and 4 over architectures x adapters: the plain loop, the Trainer and Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import frostline
from frostline.blocks import BlockStack
from tests.architectures import ARCHITECTURES, Architecture
from tests.laws.loops import OPTIMIZERS, Rows, crossing, moved, parameters

BY_NAME = {a.name: a for a in ARCHITECTURES}
PLAN: dict[str, Any] = {"steps_per_epoch": 4, "epochs": 2, "batch_size": 4}
# Moves the line at steps 4, 6 and 8 of 8: depths 1, 2 and 3.
RAMP: dict[str, Any] = {"policy": "ramp", "start": 0.25, "level": 0.75, "evaluations_per_epoch": 2}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)


class Watch:
    """Holds the prefix to law 1 at every step: call :meth:`look` after each with the depth of the step to come."""

    def __init__(self, architecture: Architecture, model: nn.Module) -> None:
        self.architecture, self.model = architecture, model
        self.stack = BlockStack.find(model, architecture.path)
        self.depths: list[int] = []
        self.before = parameters(model)

    def look(self, depth: int) -> None:
        """Compare with the last look: what lay below the line since then must not have moved, the rest must have."""
        after = parameters(self.model)
        if self.depths:
            changed, last = moved(self.before, after), self.depths[-1]
            assert not changed & set(self.stack.prefix_parameters(last)), f"the prefix moved at depth {last}"
            assert changed & set(self.stack.parameters_of("head")), "the head did not train"
        self.before = after
        self.depths.append(depth)


class _Loop:
    """A plain loop of eight seeded steps with Frostline."""

    def __init__(self, architecture: Architecture, options: dict[str, Any]) -> None:
        self.architecture = architecture
        self.model = architecture.build()
        self.optimizer = OPTIMIZERS["adamw"](self.model.parameters())
        self.frost = frostline.Frostline(self.model, self.optimizer, blocks=architecture.path, **PLAN, **options)

    def train(self, first: int, last: int, watch: Watch | None = None) -> None:
        for step in range(first, last):
            self.model.train()
            transformers.set_seed(step)
            self.model(**self.architecture.inputs(seed=step)).loss.backward()
            self.frost.before_step()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.frost.after_step()
            if watch:
                watch.look(self.frost.depth)


@every_architecture
def test_plain_loop(architecture: Architecture) -> None:
    loop = _Loop(architecture, RAMP)
    watch = Watch(architecture, loop.model)
    loop.train(0, 8, watch)
    assert watch.depths == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [m["depth"] for m in loop.frost.summary()["trajectory"]] == [1, 2, 3]
    loop.frost.finish()
    assert all(m.training for m in loop.model.modules())


@every_architecture
def test_gradient_norm_only_moves_the_line_up(architecture: Architecture) -> None:
    loop = _Loop(architecture, {"policy": "gradient-norm", "percentile": 100.0, "evaluations_per_epoch": 2})
    watch = Watch(architecture, loop.model)
    loop.train(0, 8, watch)
    assert watch.depths == sorted(watch.depths)
    assert loop.frost.summary()["decisions"] == 4


@every_architecture
@pytest.mark.parametrize("policy", ["ramp", "gradient-norm", "random-blocks"])
def test_resume_in_a_plain_loop_is_bit_exact(architecture: Architecture, policy: str) -> None:
    """Stop after step 5, in the middle of an interval, with a frozen prefix."""
    options = {
        "ramp": RAMP,
        "gradient-norm": {"policy": policy, "percentile": 100.0, "evaluations_per_epoch": 2},
        "random-blocks": {"policy": policy, "active": 2, "every": 3},
    }[policy]
    whole = _Loop(architecture, options)
    whole.train(0, 7)
    first = _Loop(architecture, options)
    first.train(0, 5)
    second = _Loop(architecture, options)
    second.model.load_state_dict(first.model.state_dict())
    # The frozen set is applied first: it says which parameters have state.
    second.frost.load_state_dict(first.frost.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(5, 7)
    # The interval that was cut in two ended at step 6: the same numbers, even where another decision is luck.
    states = [loop.frost.state_dict() for loop in (whole, second)]
    assert states[0]["state"].get("policy_state") == states[1]["state"].get("policy_state")
    assert not moved(states[0]["tensors"], states[1]["tensors"])
    for loop in (whole, second):
        loop.train(7, 8)
    assert not moved(parameters(whole.model), parameters(second.model))
    timeless = [{k: v for k, v in loop.frost.summary().items() if k != "seconds"} for loop in (whole, second)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name != "plain"], ids=repr)
def test_trainer(architecture: Architecture, tmp_path: Path) -> None:
    """Default arguments: clipping, a linear schedule, fused AdamW. (The outputs of ``plain`` are not for a Trainer.)"""
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-3,
        save_strategy="no",
    )
    model = architecture.build()
    host = transformers.Trainer(model, arguments, train_dataset=Rows(architecture))
    watch = Watch(architecture, model)
    frost = frostline.attach(host, blocks=architecture.path, **RAMP)

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.look(frost.depth)

    host.add_callback(Look())
    host.train()
    assert watch.depths == [0, 0, 0, 1, 1, 2, 2, 3]
    assert frost.summary()["final_depth"] == 3


@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v2", "t5", "resnet", "plain"])
def test_lightning(name: str, tmp_path: Path) -> None:
    """A LightningModule calls its network in ``training_step``: its own forward, and hooks on it, never run."""
    pl = pytest.importorskip("lightning.pytorch")
    from frostline.adapters.lightning import FrostlineCallback

    architecture = BY_NAME[name]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = architecture.build()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.network(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS["adamw"](self.parameters())

    module = Module()
    watch = Watch(architecture, module.network)
    boundaries: list[Tensor] = []
    path = f"network.{architecture.path}" if architecture.path else None
    callback = FrostlineCallback(blocks=path, policy="static", depth=2)

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            watch.look(callback.depth)
            with torch.no_grad(), crossing(watch.stack.blocks[2]) as seen:
                module.network(**architecture.inputs())
            boundaries.append(next(t for t in seen[0] if t.is_floating_point()).clone())

    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, Look()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(Rows(architecture), batch_size=4))
    assert watch.depths == [2, 2, 2, 2]
    assert all(torch.equal(boundaries[0], b) for b in boundaries[1:]), "what crosses the frost line changed"
