"""A Trainer's checkpoints that are torn, incomplete, or of another run: which one is taken, and what is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback, Trainer

import frostline
from frostline.adapters.checkpoints import newest_complete
from frostline.errors import ResumeError
from frostline.events import EventLog
from tests.faults.child import STEPS_PER_EPOCH, build_trainer, collate

OURS = {"frostline_state.json", "frostline_state.safetensors"}
Fault = Callable[[Path], None]


def trainer_in(folder: Path) -> Trainer:
    return build_trainer(folder, "length-grouped", num_train_epochs=1)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """One epoch with a checkpoint every 5 steps, the last two of which are kept: 10 and 15."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_in(folder)
    frostline.attach(trainer, percentile=75)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def folder(finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_rotation_keeps_ours_with_the_rest(folder: Path) -> None:
    kept = sorted((folder / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["checkpoint-10", "checkpoint-15"]
    for checkpoint in kept:
        assert {p.name for p in checkpoint.glob("frostline*")} == OURS


def test_nothing_of_ours_is_pickled(folder: Path) -> None:
    """The pickles in a checkpoint are the Trainer's own: the same files as without Frostline, loadable without code."""
    checkpoint = folder / "checkpoints" / "checkpoint-10"
    plain = build_trainer(folder / "plain", "length-grouped", max_steps=5)
    plain.train()
    theirs = {p.name for p in (folder / "plain" / "checkpoints" / "checkpoint-5").iterdir()}
    assert {p.name for p in checkpoint.iterdir()} == theirs | OURS
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    assert (checkpoint / "frostline_state.json").read_bytes().startswith(b"{")


def truncate(file: str) -> Fault:
    def fault(checkpoint: Path) -> None:
        blob = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(blob[: len(blob) // 2])

    return fault


def delete(file: str) -> Fault:
    return lambda checkpoint: (checkpoint / file).unlink()


def flip(checkpoint: Path) -> None:
    path = checkpoint / "frostline_state.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


FAULTS = {
    "torn-json": truncate("frostline_state.json"),
    "torn-tensors": truncate("frostline_state.safetensors"),
    "flipped-bit": flip,
    "no-json": delete("frostline_state.json"),
    "no-tensors": delete("frostline_state.safetensors"),
    "torn-trainer-state": truncate("trainer_state.json"),
    "no-trainer-state": delete("trainer_state.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_complete_checkpoint_is_found(folder: Path, fault: str) -> None:
    checkpoints = folder / "checkpoints"
    assert newest_complete(checkpoints, ours=True) == checkpoints / "checkpoint-15"
    FAULTS[fault](checkpoints / "checkpoint-15")
    assert newest_complete(checkpoints, ours=True) == checkpoints / "checkpoint-10"


def test_a_run_goes_on_from_the_newest_complete_one(
    finished: tuple[Path, dict[str, torch.Tensor]], folder: Path
) -> None:
    flip(folder / "checkpoints" / "checkpoint-15")
    trainer, log = trainer_in(folder), EventLog()
    frostline.attach(trainer, percentile=75, events=log)
    trainer.train(resume_from_checkpoint=True)
    assert [e["step"] for e in log.events if e["event"] == "resume"] == [10]
    found = weights(trainer)
    assert all(torch.equal(found[name], value) for name, value in finished[1].items())


@pytest.mark.parametrize("fault", FAULTS)
def test_only_incomplete_checkpoints_are_an_error_that_names_the_directory(folder: Path, fault: str) -> None:
    for name in ("checkpoint-10", "checkpoint-15"):
        FAULTS[fault](folder / "checkpoints" / name)
    trainer = trainer_in(folder)
    frostline.attach(trainer, percentile=75)
    with pytest.raises(ResumeError, match="no complete checkpoint with Frostline's state in") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert str(folder / "checkpoints") in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("torn-json", "cannot be read"),
        ("torn-tensors", "does not match its checksum"),
        ("no-json", "frostline_state.json is missing"),
        ("no-trainer-state", "was not written to its end: trainer_state.json is missing or torn"),
    ],
)
def test_a_torn_checkpoint_that_is_named_is_an_error(folder: Path, fault: str, says: str) -> None:
    """Not a fresh start of freezing: the one who names it believes that it is whole."""
    checkpoint = folder / "checkpoints" / "checkpoint-15"
    FAULTS[fault](checkpoint)
    trainer = trainer_in(folder)
    before = weights(trainer)
    frostline.attach(trainer, percentile=75)
    with pytest.raises(ResumeError, match=says) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items()), "loaded before the check"


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    frostline.attach(trainer, percentile=75)
    with pytest.raises(ResumeError, match="nothing to resume: .*/nowhere is not a directory"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 16}, {"num_labels": 5}])
@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_of_another_model_is_an_error(folder: Path, change: dict[str, int], named: bool) -> None:
    trainer = trainer_in(folder)
    trainer.model = BertForSequenceClassification(BertConfig.from_dict({**trainer.model.config.to_dict(), **change}))
    frostline.attach(trainer, percentile=75)
    with pytest.raises(ResumeError, match="belongs to another model") as caught:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-15") if named else True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", [("gradient-norm", {"percentile": 50}), ("ramp", {})])
def test_a_checkpoint_of_another_policy_is_an_error(folder: Path, policy: tuple[str, dict[str, int]]) -> None:
    trainer = trainer_in(folder)
    frostline.attach(trainer, policy[0], **policy[1])
    with pytest.raises(ResumeError, match="was made with policy gradient-norm") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert policy[0] in str(caught.value)


def test_a_checkpoint_without_ours_is_continued_with_freezing_anew(tmp_path: Path) -> None:
    """Decisions fall on the same marks as in a whole run: no burst of them to catch up."""
    plain = build_trainer(tmp_path, "length-grouped", num_train_epochs=2, max_steps=STEPS_PER_EPOCH + 5)
    plain.train()
    trainer, log = build_trainer(tmp_path, "length-grouped", num_train_epochs=2), EventLog()
    frost = frostline.attach(trainer, percentile=75, events=log)
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{STEPS_PER_EPOCH + 5}"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    limits = [e for e in log.events if e["event"] == "limit"]
    assert [(e["code"], e["step"], e["samples"]) for e in limits] == [("resume", 20, 236 + 5 * 16)]
    assert str(checkpoint) in limits[0]["message"]
    assert [e["step"] for e in log.events if e["event"] == "decision"] == [21, 24, 27, 30]
    assert frost.summary()["samples"] == 2 * 236


def test_true_does_not_take_checkpoints_without_ours(tmp_path: Path) -> None:
    build_trainer(tmp_path, "length-grouped", max_steps=5).train()
    trainer = trainer_in(tmp_path)
    frostline.attach(trainer, percentile=75)
    with pytest.raises(ResumeError, match="no complete checkpoint with Frostline's state"):
        trainer.train(resume_from_checkpoint=True)


# -- what the Trainer loses and the adapter cannot mend is said --------------------------------------------


def limits(log: EventLog) -> list[str]:
    return [event["code"] for event in log.events if event["event"] == "limit"]


def masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.1] = 0
    return batch


@pytest.mark.parametrize("random", [True, False])
def test_data_that_draw_random_numbers_are_a_limit(tmp_path: Path, random: bool) -> None:
    trainer, log = build_trainer(tmp_path, "length-grouped", max_steps=3), EventLog()
    if random:
        trainer.data_collator = masked
    frostline.attach(trainer, percentile=75, events=log)
    trainer.train()
    assert limits(log) == (["random-inputs"] if random else [])


@pytest.mark.parametrize("restored", [True, False])
def test_a_patience_that_the_trainer_forgets_is_a_limit(tmp_path: Path, restored: bool) -> None:
    settings: dict[str, Any] = {
        "num_train_epochs": 2, "load_best_model_at_end": True, "save_strategy": "epoch",
        "metric_for_best_model": "loss", "restore_callback_states_from_checkpoint": restored,
    }  # fmt: skip
    for resume in (False, True):
        trainer, log = build_trainer(tmp_path, "length-grouped", **settings), EventLog()
        trainer.add_callback(EarlyStoppingCallback(3))
        frostline.attach(trainer, percentile=75, events=log)
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{STEPS_PER_EPOCH}"
        trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        assert limits(log) == (["early-stopping"] if resume and not restored else [])
