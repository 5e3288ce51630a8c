"""Law 2: policy ``none`` installs nothing, and the run is bit for bit the one without Frostline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import frostline
from frostline.policies.base import Decision
from tests.architectures import ARCHITECTURES, REFUSED, Architecture
from tests.laws.loops import OPTIMIZERS, Rows, Run, installed, moved, parameters

BY_NAME = {a.name: a for a in (*ARCHITECTURES, *REFUSED)}
PLAN: dict[str, Any] = {"steps_per_epoch": 3, "epochs": 2, "batch_size": 4}

every_architecture = pytest.mark.parametrize("architecture", [*ARCHITECTURES, *REFUSED], ids=repr)


def train(architecture: Architecture, *, with_frostline: bool) -> tuple[nn.Module, list[float]]:
    """Four seeded steps of a plain loop; with Frostline, nothing may be installed at any moment of it."""
    model = architecture.build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model(**architecture.inputs())  # some of transformers' models install recorders of their own on first use
    transformers.set_seed(5)
    before = installed(model, optimizer)
    frost = frostline.Frostline(model, optimizer, policy="none", **PLAN) if with_frostline else None
    losses = []
    for step in range(4):
        model.train()
        loss = model(**architecture.inputs(seed=step)).loss
        loss.backward()
        if frost:
            frost.before_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert installed(model, optimizer) == before
        optimizer.step()
        optimizer.zero_grad()
        if frost:
            frost.after_step()
        losses.append(float(loss.detach()))
    if frost:
        assert frost.depth == 0
        assert frost.summary()["steps"] == 4
        frost.state_dict()
        frost.finish()
    assert installed(model, optimizer) == before
    return model, losses


@every_architecture
def test_none_installs_nothing_and_changes_no_bit(architecture: Architecture) -> None:
    """Models that cannot be frozen at all (ALBERT) run under ``none`` too."""
    plain, plain_losses = train(architecture, with_frostline=False)
    ours, our_losses = train(architecture, with_frostline=True)
    assert our_losses == plain_losses
    assert not moved(parameters(plain), parameters(ours))
    for (name, expected), (_, actual) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
        assert torch.equal(expected, actual), name


@every_architecture
def test_none_draws_no_random_number(architecture: Architecture) -> None:
    model = architecture.build()
    before = torch.get_rng_state()
    frostline.Frostline(model, OPTIMIZERS["sgd"](model.parameters()), policy="none", **PLAN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_release_leaves_an_ordinary_model(architecture: Architecture) -> None:
    """The same inventory shows that freezing is seen by it, and that ``release`` takes everything away."""
    run = Run(architecture)
    before = installed(run.model, run.optimizer)
    run.freeze(2, run.stack.block_paths[3])
    assert installed(run.model, run.optimizer) != before
    run.freezer.apply(Decision())
    assert installed(run.model, run.optimizer) == before, "depth 0 must cost nothing"
    run.freeze(1)
    run.freezer.release()
    assert installed(run.model, run.optimizer) == before
    assert all(m.training for m in run.model.modules())


def trainer(architecture: Architecture, directory: Path) -> transformers.Trainer:
    """A Trainer with default arguments on 16 rows: 8 steps."""
    arguments = transformers.TrainingArguments(
        str(directory), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True
    )
    return transformers.Trainer(architecture.build(), arguments, train_dataset=Rows(architecture))


def shape(host: transformers.Trainer) -> dict[str, Any]:
    """What hangs on a Trainer: its class, its attributes by identity, its callbacks, and what hangs on its model."""
    return {
        "class": type(host),
        "attributes": {k: id(v) for k, v in vars(host).items()},
        "callbacks": [id(c) for c in host.callback_handler.callbacks],
        "accelerator": {k: id(v) for k, v in vars(host.accelerator).items()},
        "model": installed(host.model),
    }


@pytest.mark.parametrize("name", ["bert", "resnet", "albert"])
def test_none_leaves_the_trainer_alone(name: str, tmp_path: Path) -> None:
    architecture = BY_NAME[name]
    plain = trainer(architecture, tmp_path / "plain")
    plain.train()

    ours = trainer(architecture, tmp_path / "ours")
    before = shape(ours)
    frost = frostline.attach(ours, policy="none")
    assert shape(ours) == before
    ours.train()
    assert installed(ours.model, identity=False) == installed(plain.model, identity=False)
    assert [type(c) for c in ours.callback_handler.callbacks] == [type(c) for c in plain.callback_handler.callbacks]
    assert frost.summary()["final_depth"] == 0
    assert not moved(parameters(plain.model), parameters(ours.model))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, ours)]
    assert losses[0] == losses[1]
