"""``attach(trainer, memory=...)``: what autograd saves is compressed while the Trainer trains, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import frostline
from frostline.errors import ConfigError, ModelError
from tests.adapters.hosts import bert, trainer_for
from tests.memory.steps import everything_packs, packed_roles


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with everything_packs():
        yield


@pytest.fixture
def packed() -> Iterator[list[str]]:
    with packed_roles() as found:
        yield found


@pytest.mark.parametrize("policy", ["none", "interlayer", "static"])
def test_training_is_compressed_and_the_model_is_left_as_it_was(policy: str, tmp_path: Path, packed: list[str]) -> None:
    trainer = trainer_for(tmp_path)
    options = {"depth": 1} if policy == "static" else {}
    frost = frostline.attach(trainer, policy, memory="slimfit", **options)
    trainer.train()
    assert packed
    model = trainer.model
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert frost.summary()["steps"] == trainer.state.global_step
    assert frost.summary()["memory"]["kept"] > 0
    assert "memory: level slimfit, at most" in str(frost.summary())
    packed.clear()
    model.train()
    model(torch.tensor([[4, 5, 6]]), labels=torch.tensor([1])).loss.backward()
    assert not packed


def test_policy_none_without_memory_still_installs_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    frostline.attach(trainer, "none")
    assert "train" not in vars(trainer)
    assert not trainer.model._forward_pre_hooks


def test_a_model_that_the_trainer_makes_itself(tmp_path: Path, packed: list[str]) -> None:
    trainer = trainer_for(tmp_path, extra={"model_init": lambda: bert()})
    frostline.attach(trainer, "none", memory="safe")
    trainer.train()
    assert packed


def test_what_cannot_be_compressed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown memory level 'tiny'.*slimfit"):
        frostline.attach(trainer_for(tmp_path), memory="tiny")
    with pytest.raises(ModelError, match="torch_compile"):
        frostline.attach(trainer_for(tmp_path, torch_compile=True), "none", memory="safe")
