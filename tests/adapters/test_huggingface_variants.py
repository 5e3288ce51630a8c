"""``attach``: subclasses, adapters, ``detach`` and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import frostline
from frostline.errors import ConfigError, FrostlineError, ModelError
from tests.adapters.hosts import RAMP, assert_ordinary, bert, run, trainer_for

MOVES = [(6, 1), (12, 2), (16, 3)]


class _OwnTrainer(transformers.Trainer):
    """A loss and an optimizer of its own: two groups with two rates, as layer-wise decay has them."""

    losses = 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        self.losses += 1
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels) + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        assert self.model is not None
        if self.optimizer is None:
            head = list(self.model.classifier.parameters())
            body = [p for p in self.model.bert.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(
                [{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-3, "weight_decay": 0.1}]
            )
        return self.optimizer


def test_subclass_with_its_own_loss_and_optimizer(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, kind=_OwnTrainer)
    outcome = run(trainer)
    assert outcome.moves == MOVES
    assert trainer.losses == 16
    assert [len(g["params"]) for g in trainer.optimizer.param_groups] == [2, 71]
    assert len(trainer.optimizer.state) == 73 - outcome.witness.frozen[-1] - 16, "moments of what is frozen are dropped"


def test_optimizer_given_to_the_trainer(tmp_path: Path) -> None:
    model = bert(dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    trainer = trainer_for(tmp_path, model, extra={"optimizers": (optimizer, None)})
    outcome = run(trainer)
    assert outcome.moves == MOVES
    assert sorted(set(outcome.witness.frozen)) == [0, 21, 37]


def test_compute_loss_func(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels)

    assert run(trainer_for(tmp_path, extra={"compute_loss_func": loss})).moves == MOVES


def test_what_was_frozen_before_stays_frozen(tmp_path: Path) -> None:
    """``run`` checks that every parameter ends with the ``requires_grad`` it began with."""
    model = bert(dropout=0.1)
    model.bert.encoder.layer[3].requires_grad_(False)
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    outcome = run(trainer_for(tmp_path, model))
    assert outcome.moves == MOVES
    assert sorted(set(outcome.witness.frozen)) == [17, 21 + 16, 37 + 16]


@pytest.mark.parametrize("save", [False, True])
def test_lora(save: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=2, lora_dropout=0.1, target_modules=["query", "value"])
    model = peft.get_peft_model(bert(dropout=0.1), config)
    adapters = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert len(adapters) == 16
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    changes: dict[str, Any] = (
        {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
         "load_best_model_at_end": True} if save else {}
    )  # fmt: skip
    outcome = run(trainer_for(tmp_path, model, **changes), policy="gradient-norm", percentile=100.0)
    active = {len(base) + 4 * depth for _, depth in outcome.moves}
    assert len(outcome.moves) > 0, "nothing froze: the test shows nothing"
    assert active <= set(outcome.witness.frozen) | {len(base) + 4 * outcome.moves[-1][1]}
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


# -- detach -----------------------------------------------------------------------------------------


def _installed(trainer: transformers.Trainer) -> dict[str, Any]:
    """What hangs on a Trainer and its accelerator: wrapped methods and callbacks."""
    return {
        "methods": {k: v for k, v in vars(trainer).items() if callable(v) and hasattr(transformers.Trainer, k)},
        "accelerator": {k for k in vars(trainer.accelerator) if hasattr(type(trainer.accelerator), k)},
        "callbacks": list(trainer.callback_handler.callbacks),
    }


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_detach_puts_everything_back(when: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    before, attributes = _installed(trainer), set(vars(trainer))
    frost = frostline.attach(trainer, **RAMP)
    assert _installed(trainer) != before
    if when != "before":
        trainer.train()
        assert frost.summary()["final_depth"] == 3
    frost.detach()
    frost.detach()
    assert _installed(trainer) == before
    if when == "before":
        assert set(vars(trainer)) == attributes
    steps = len(frost.log.events)
    if when != "after":
        trainer.train()
        assert trainer.state.global_step == 16
    assert len(frost.log.events) == steps, "a detached handle still writes"
    assert_ordinary(trainer.model)
    assert all(p.requires_grad for p in trainer.model.parameters())
    again = frostline.attach(trainer, policy="static", depth=1)
    trainer.train()
    assert again.summary()["final_depth"] == 1


def test_detach_in_the_middle_of_training(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    before = _installed(trainer)
    frost = frostline.attach(trainer, **RAMP)
    trainable: list[int] = []

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: transformers.TrainerState, *_: Any, **__: Any) -> None:
            if state.global_step == 13:
                frost.detach()
            trainable.append(sum(p.requires_grad for p in trainer.model.parameters()))

    stop = Stop()
    trainer.add_callback(stop)
    trainer.train()
    assert trainable == [73] * 5 + [52] * 6 + [36] + [73] * 4
    assert frost.summary()["steps"] == 13
    trainer.remove_callback(stop)
    assert _installed(trainer) == before
    assert_ordinary(trainer.model)


def test_detach_leaves_other_peoples_wrappers(tmp_path: Path) -> None:
    """A method that was replaced on the Trainer itself, before ``attach``, is back afterwards."""
    trainer = trainer_for(tmp_path)
    calls: list[str] = []
    original = trainer.create_optimizer

    def replaced(*args: Any) -> Any:
        calls.append("optimizer")
        return original(*args)

    trainer.create_optimizer = replaced  # type: ignore[method-assign]
    frost = frostline.attach(trainer, **RAMP)
    trainer.train()
    frost.detach()
    assert calls == ["optimizer"]
    assert trainer.create_optimizer is replaced


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "gradnorm"}, ["'gradnorm'", "did you mean 'gradient-norm'", "random-blocks"]),
        ({"percentil": 50}, ["'percentil'", "did you mean 'percentile'", "evaluations_per_epoch"]),
        ({"percentile": 101}, ["percentile=101", "less than or equal to 100"]),
        ({"percentile": -1}, ["percentile=-1", "greater than or equal to 0"]),
        ({"evaluations_per_epoch": 0}, ["evaluations_per_epoch=0"]),
        ({"percentile": 101, "evaluations": 3}, ["percentile=101", "'evaluations'"]),
        ({"policy": "static"}, ["depth", "fraction"]),
        ({"policy": "static", "depth": 1, "fraction": 0.5}, ["not both"]),
        ({"policy": "static", "depth": -1}, ["depth=-1"]),
        ({"policy": "none", "depth": 1}, ["'depth'", "'depth' is an option of policy 'static'"]),
        ({"memroy": "max"}, ["'memroy': did you mean 'memory'?", "max_depth_changes", "percentile"]),
        ({"memory": True}, ["memory: must be a level", "not True"]),
        ({"cache": "gpu"}, ["unknown cache mode 'gpu'", "auto, disk, memory, off"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    before = _installed(trainer)
    with pytest.raises(ConfigError) as caught:
        frostline.attach(trainer, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert _installed(trainer) == before


@pytest.mark.parametrize("options", [{"policy": "static", "depth": 4}, {"policy": "random-blocks", "active": 5}])
def test_options_that_do_not_fit_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    before = _installed(trainer)
    with pytest.raises(ConfigError, match="4 blocks"):
        frostline.attach(trainer, **options)
    assert _installed(trainer) == before
    assert_ordinary(trainer.model)


def test_everything_frozen(tmp_path: Path) -> None:
    model = bert()
    model.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(True)
    frostline.attach(trainer := trainer_for(tmp_path, model), policy="static", depth=2)
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        trainer.train()


def test_double_attach(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    frost = frostline.attach(trainer, **RAMP)
    with pytest.raises(ConfigError, match=r"attached already: call detach\(\)"):
        frostline.attach(trainer, **RAMP)
    frost.detach()
    frostline.attach(trainer, **RAMP)


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer.args, "_n_gpu", 4)
    with pytest.raises(ModelError, match="torchrun --nproc-per-node=4"):
        frostline.attach(trainer)


@pytest.mark.parametrize(("flag", "name"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")])
def test_sharded_training(flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer, flag, True)
    with pytest.raises(ModelError, match=f"{name} cannot change what is frozen"):
        frostline.attach(trainer)


def test_model_without_a_stack(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(self.embedding(input_ids).mean(1), labels)}

    trainer = trainer_for(tmp_path, Flat())
    with pytest.raises(ModelError, match="Flat has no list of two or more blocks"):
        frostline.attach(trainer)
    with pytest.raises(ModelError, match=r"'bert.encoder.layers': did you mean 'bert.encoder.layer'"):
        frostline.attach(trainer_for(tmp_path), blocks="bert.encoder.layers")


def test_summary_before_training(tmp_path: Path) -> None:
    frost = frostline.attach(trainer_for(tmp_path), **RAMP)
    assert frost.depth == 0
    with pytest.raises(FrostlineError, match=r"call trainer.train\(\) first"):
        frost.summary()
