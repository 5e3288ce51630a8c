"""``attach``: what people switch on in a Trainer, each with a frost line that moves while it trains."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import frostline
from tests.adapters.hosts import (
    RAMP,
    Rows,
    Stream,
    assert_ordinary,
    bert,
    run,
    trainer_for,
)

# Eight steps an epoch, two epochs, looked at four times an epoch: what RAMP does where nothing else is said.
MOVES = [(6, 1), (12, 2), (16, 3)]

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no-clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "adamw-eager": {"optim": "adamw_torch", "weight_decay": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing-reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluate-and-save": {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3},
    "eval-on-start": {"eval_on_start": True},
}

# The same, where the number of steps is another: settings, rows, moves.
LENGTHS: dict[str, tuple[dict[str, Any], Any, list[tuple[int, int]]]] = {
    "accumulation": ({"gradient_accumulation_steps": 2}, None, [(3, 1), (6, 2), (8, 3)]),
    "accumulation-with-a-rest": ({"gradient_accumulation_steps": 3}, None, [(2, 1), (4, 2), (6, 3)]),
    "fractional-epochs": ({"num_train_epochs": 1.5}, None, [(4, 1), (8, 2), (12, 3)]),
    "max-steps": ({"max_steps": 10}, None, [(4, 1), (8, 2), (10, 3)]),
    "stream": ({"max_steps": 8}, Stream(), [(4, 1), (6, 2), (8, 3)]),
    "drop-last": ({"dataloader_drop_last": True, "per_device_train_batch_size": 7}, None, [(7, 1), (12, 2), (18, 3)]),
    "length-grouped": ({"train_sampling_strategy": "group_by_length"}, Rows(ragged=True), MOVES),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name: str, tmp_path: Path) -> None:
    outcome = run(trainer_for(tmp_path, **SETTINGS[name]))
    assert outcome.moves == MOVES
    assert sorted(set(outcome.witness.frozen)) == [0, 21, 37]
    assert outcome.limits() == ({"neftune"} if name == "neftune" else set())


@pytest.mark.parametrize("name", LENGTHS)
def test_length_of_the_run(name: str, tmp_path: Path) -> None:
    settings, rows, moves = LENGTHS[name]
    outcome = run(trainer_for(tmp_path, rows=rows, **settings))
    assert outcome.moves == moves
    summary = outcome.frost.summary()
    assert summary["steps"] == outcome.trainer.state.global_step == len(outcome.witness.frozen)
    seen = {"fractional-epochs": 96, "max-steps": 80, "stream": 64, "drop-last": 126}.get(name, 128)
    assert summary["samples"] == seen


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("static", {"depth": 2}),
        ("static", {"fraction": 0.5}),
        ("ramp", {"start": 0.25, "level": 1.0}),
        ("random-blocks", {"active": 1, "every": 2}),
        ("random-blocks", {"active": 2, "every": 3, "stem": False, "head": False}),
        ("gradient-norm", {}),
        ("gradient-norm", {"percentile": 100.0, "evaluations_per_epoch": 2}),
    ],
)
def test_policy(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    outcome = run(trainer_for(tmp_path, logging_steps=2), policy=policy, **options)
    assert max(outcome.witness.frozen) > 0, "nothing was ever frozen"
    assert len(outcome.witness.frozen) == 16
    assert outcome.frost.summary()["policy"]["name"] == policy
    logged = [line["frost_depth"] for line in outcome.trainer.state.log_history if "loss" in line]
    assert len(logged) == 8
    if policy == "static":
        assert set(outcome.witness.frozen) == {37}, "frozen from the first step on, to the last"
        assert set(logged) == {2}
    if policy == "random-blocks":
        block = 16
        resting = 3 * block if options["active"] == 1 else 2 * block + 5 + 4
        assert set(outcome.witness.frozen) == {resting}
        drawn = {tuple(e["resting"]) for e in outcome.decisions()}
        assert len(drawn) > 1, "the same blocks at every draw"


def test_policy_none_leaves_the_trainer_alone(tmp_path: Path) -> None:
    plain, attached = (trainer_for(tmp_path / name) for name in ("plain", "attached"))
    before = dict(vars(attached))
    callbacks = list(attached.callback_handler.callbacks)
    frost = frostline.attach(attached, policy="none")
    assert vars(attached) == before
    assert attached.callback_handler.callbacks == callbacks
    for trainer in (plain, attached):
        transformers.set_seed(0)
        trainer.train()
    ours = attached.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.model.state_dict().items())
    assert frost.depth == 0
    assert frost.summary()["trajectory"] == []


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        load_best_model_at_end=True,
        save_total_limit=2,
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    outcome = run(trainer)
    assert outcome.moves == MOVES
    best = trainer.state.best_model_checkpoint
    assert best is not None
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(best).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())


def test_saved_model_is_the_one_in_memory(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=16)
    run(trainer)
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path / "model", tmp_path / "checkpoint-16"):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        expected = trainer.model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    for original in (trainer.model, copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        assert_ordinary(original)
        original.train()
        assert all(m.training for m in original.modules())


class _At(transformers.TrainerCallback):
    """Calls ``action()`` at the end of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: transformers.TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            self.action()


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _through_a_file])
def test_a_frozen_model_can_be_copied(duplicate: Any, tmp_path: Path) -> None:
    """As EMA callbacks, best-model keepers and ``torch.save`` do in the middle of a run."""
    trainer = trainer_for(tmp_path)
    batch = {"input_ids": torch.arange(3, 19).reshape(2, 8), "labels": torch.tensor([0, 1])}
    copies: list[nn.Module] = []

    def take() -> None:
        twin = duplicate(trainer.model)
        trainer.model.eval()
        twin.eval()
        with torch.no_grad():
            assert torch.equal(twin(**batch).logits, trainer.model(**batch).logits)
        copies.append(twin)

    trainer.add_callback(_At(13, take))
    outcome = run(trainer)
    assert outcome.moves == MOVES
    (twin,) = copies
    before = [m.training for m in trainer.model.modules()]
    twin.train()
    twin(**batch).loss.backward()
    assert [m.training for m in trainer.model.modules()] == before, "the copy drives the original"
    assert twin.bert.encoder.layer[3].output.dense.weight.grad is not None
    assert twin.bert.encoder.layer[0].output.dense.weight.grad is None


# -- more than one training run ---------------------------------------------------------------------


def _optimized(trainer: transformers.Trainer) -> set[int]:
    return {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}


def test_second_train_starts_thawed(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    outcome = run(trainer)
    first = list(outcome.witness.frozen)
    outcome.witness.frozen.clear()
    started: list[bool] = []
    trainer.add_callback(_At(1, lambda: started.append(all(p.requires_grad for p in trainer.model.parameters()))))
    trainer.train()
    assert started == [True]
    assert outcome.witness.frozen == first
    assert _optimized(trainer) == {id(p) for p in trainer.model.parameters()}
    assert outcome.moves == MOVES
    assert [e["event"] for e in outcome.frost.log.events].count("run") == 2
    assert_ordinary(trainer.model)


class _SmallMemory(transformers.BertForSequenceClassification):
    """Runs out of memory after 45 rows where a batch has more than four."""

    seen = 0

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Any:
        if self.training and len(input_ids) > 4:
            if self.seen >= 45:
                self.seen = 0
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            self.seen += len(input_ids)
        return super().forward(input_ids, attention_mask, labels=labels)


def test_auto_find_batch_size_starts_again_thawed(tmp_path: Path) -> None:
    """The attempts at 8, 7, 6 and 5 rows freeze a block and then fail; the one at 4 must train everything."""
    model = _SmallMemory(bert(dropout=0.1).config)
    trainer = trainer_for(tmp_path, model, rows=Rows(60), auto_find_batch_size=True)
    trainable: dict[int, int] = {}

    class Count(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: transformers.TrainerState, *_: Any, **__: Any) -> None:
            if state.global_step == 0:
                trainable[trainer._train_batch_size] = sum(p.requires_grad for p in model.parameters())

    trainer.add_callback(Count())
    outcome = run(trainer, **(RAMP | {"evaluations_per_epoch": 8}))
    everything = sum(1 for _ in model.parameters())
    assert trainable == {8: everything, 7: everything, 6: everything, 5: everything, 4: everything}
    assert _optimized(trainer) == {id(p) for p in model.parameters()}
    runs = [i for i, e in enumerate(outcome.events) if e["event"] == "run"]
    assert [outcome.events[i]["plan"]["samples_per_step"] for i in runs] == [8, 7, 6, 5, 4]
    for first, last in zip(runs, runs[1:], strict=False):
        assert any(e["event"] == "decision" and e["depth"] > 0 for e in outcome.events[first:last]), (
            "this attempt failed before anything froze: the test shows nothing"
        )
    assert outcome.frost.summary()["samples"] == 120
    assert outcome.moves == [(10, 1), (21, 2), (30, 3)]


def test_a_failed_run_leaves_an_ordinary_model(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("the data ran out")

    trainer = trainer_for(tmp_path)
    frost = frostline.attach(trainer, **RAMP)
    trainer.add_callback(_At(13, fail))
    with pytest.raises(ValueError, match="the data ran out"):
        trainer.train()
    assert_ordinary(trainer.model)
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert frost.summary()["final_depth"] == 2


def test_model_init(tmp_path: Path) -> None:
    """Every ``train()`` builds a model of its own; the frozen set belongs to that one."""
    trainer = trainer_for(tmp_path, extra={"model_init": lambda: bert(dropout=0.1)})
    outcome = run(trainer)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert outcome.moves == MOVES
    assert _optimized(trainer) == {id(p) for p in trainer.model.parameters()}
    for model in (first, trainer.model):
        assert_ordinary(model)
        assert all(p.requires_grad for p in model.parameters())


def test_hyperparameter_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the search itself is optuna's")
    trainer = trainer_for(
        tmp_path, extra={"model_init": lambda: bert(dropout=0.1)}, eval_strategy="epoch", save_strategy="epoch"
    )
    frost = frostline.attach(trainer, **RAMP)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"per_device_train_batch_size": trial.suggest_categorical("size", [4, 16])},
        n_trials=3,
        direction="minimize",
    )
    assert best.run_id is not None
    plans = [e["plan"]["samples_per_step"] for e in frost.log.events if e["event"] == "run"]
    assert len(plans) == 3
    assert set(plans) <= {4, 16}
    assert frost.summary()["final_depth"] == 3
    assert len(list(tmp_path.glob("run-*/checkpoint-*/frostline_state.json"))) == 6
    frost.detach()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
