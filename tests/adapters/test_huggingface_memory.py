"""``attach(trainer, memory=...)``: what autograd saves is compressed while the Trainer trains, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import frostline
from frostline.adapters import fitting
from frostline.errors import ConfigError, ModelError, ResumeError
from frostline.memory import LiveBytes
from frostline.memory.planner import Considered, MemoryPlan
from frostline.state import load_state, save_state
from tests.adapters.hosts import Rows, bert, trainer_for
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


def rows_of_a_budget(frost: Any) -> list[dict[str, Any]]:
    return [event for event in frost.log.events if event["event"] == "memory"]


def plain_peak(folder: Path, policy: str = "none", **options: Any) -> int:
    """What the memory model says of the run as it is."""
    trainer = trainer_for(folder, max_steps=1)
    frost = frostline.attach(trainer, policy, memory={"budget": 10**12}, **options)
    trainer.train()
    (plan,) = rows_of_a_budget(frost)
    return int(plan["plain"])


def test_a_run_that_fits_its_budget_is_left_alone(tmp_path: Path) -> None:
    plain = trainer_for(tmp_path / "a")
    plain.train()
    fitted = trainer_for(tmp_path / "b")
    frost = frostline.attach(fitted, "none", memory={"budget": "1GiB"})
    fitted.train()
    (plan,) = rows_of_a_budget(frost)
    assert (plan["steps"], plan["level"], plan["checkpointing"]) == (1, "off", False)
    for one, other in zip(plain.model.parameters(), fitted.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["none", "static", "interlayer"])
def test_a_budget_makes_the_run_smaller_and_the_settings_come_back(policy: str, tmp_path: Path) -> None:
    options = {"depth": 1} if policy == "static" else {}
    budget = int(0.97 * plain_peak(tmp_path / "a", policy, **options))
    trainer = trainer_for(tmp_path / "b", rows=Rows(64, length=8))
    args = trainer.args
    before = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing)
    frost = frostline.attach(trainer, policy, memory={"budget": budget}, **options)
    trainer.train()
    (plan,) = rows_of_a_budget(frost)
    assert plan["peak"] <= budget < plan["plain"]
    assert plan["rows"] * plan["steps"] == before[0]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.gradient_checkpointing) == before
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())
    assert frost.summary()["samples"] == 64 * args.num_train_epochs
    assert frost.summary()["memory"]["plan"]["rows"] == plan["rows"]
    assert f"micro-batches of {plan['rows']}" in str(frost.summary())


class Meter(transformers.TrainerCallback):
    """The most bytes alive at any moment of a whole run."""

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.live = LiveBytes([*model.parameters(), *model.buffers()])
        self.live.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.live.__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "interlayer", "share": "auto"},
        {"policy": "interlayer", "share": 0.9, "line": {"policy": "static", "depth": 2}},
        {"policy": "gradient-norm"},
        {"policy": "random-blocks", "active": 1, "every": 2},
    ],
    ids=lambda options: options["policy"],
)
def test_a_budget_holds_over_the_whole_run(options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever trains at a step: the embedding's turn comes too. What is measured for the policy counts."""

    def train(folder: Path, budget: int) -> tuple[Any, int]:
        trainer = trainer_for(folder, bert(hidden_size=128, intermediate_size=256), rows=Rows(64, length=16))
        frost = frostline.attach(trainer, memory={"budget": budget}, **options)
        meter = Meter()
        trainer.add_callback(meter)
        trainer.train()
        (plan,) = rows_of_a_budget(frost)
        return plan, meter.live.peak

    roomy, whole = train(tmp_path / "a", 10**12)
    assert whole <= 1.05 * roomy["peak"]
    budget = int(0.96 * roomy["peak"])
    plan, peak = train(tmp_path / "b", budget)
    assert plan["peak"] <= budget
    assert peak <= 1.02 * budget, "the Trainer's own sums and batches are not in the plan"


def test_as_few_layers_rest_as_the_budget_allows(tmp_path: Path) -> None:
    def plan(folder: Path, share: float | str, budget: int = 10**12) -> dict[str, Any]:
        trainer = trainer_for(folder, bert(hidden_size=128, intermediate_size=256), max_steps=3)
        frost = frostline.attach(trainer, "interlayer", share=share, memory={"budget": budget, "level": "off"})
        trainer.train()
        (found,) = rows_of_a_budget(frost)
        assert frost.summary()["policy"]["options"]["share"] == found["policy"].get("share", share)
        return found

    assert plan(tmp_path / "a", "auto")["policy"] == {"share": 0.34}
    half, most = (plan(tmp_path / name, share)["plain"] for name, share in (("b", 0.5), ("c", 0.95)))
    assert most < half
    with pytest.raises(ConfigError, match="cannot be met"):
        plan(tmp_path / "d", 0.5, int(0.5 * most))
    # Least of what 0.5 could do with micro-batches of one, and what 0.95 can do.
    budget = int(1.02 * plan_of_one_row(tmp_path / "e", 0.95))
    assert plan(tmp_path / "f", "auto", budget)["policy"]["share"] > 0.5


def plan_of_one_row(folder: Path, share: float) -> int:
    """What a step with a single sample takes."""
    model = bert(hidden_size=128, intermediate_size=256)
    trainer = trainer_for(folder, model, max_steps=1, per_device_train_batch_size=1)
    settings = {"budget": 10**12, "level": "off"}
    frost = frostline.attach(trainer, "interlayer", share=share, memory=settings)
    trainer.train()
    return int(rows_of_a_budget(frost)[0]["plain"])


def test_a_resumed_run_keeps_the_share_that_its_budget_chose(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}

    def train(steps: int, *, resume: bool = False, budget: int = 10**12, **options: Any) -> Any:
        trainer = trainer_for(tmp_path, max_steps=steps, **settings)
        frost = frostline.attach(trainer, memory={"budget": budget}, **options)
        trainer.train(resume_from_checkpoint=resume)
        return frost

    chosen = rows_of_a_budget(train(2, policy="interlayer", share="auto"))[0]["policy"]
    assert chosen == {"share": 0.34}
    again = train(4, resume=True, budget=10**11, policy="interlayer", share="auto")
    assert rows_of_a_budget(again)[-1]["policy"] == chosen, "another budget, the same options"
    with pytest.raises(ResumeError, match="was made with policy interlayer"):
        train(6, resume=True, policy="interlayer", share=0.9)
    with pytest.raises(ResumeError, match="was made with policy interlayer"):
        train(6, resume=True, policy="static", depth=1)


def test_an_open_share_without_a_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory.budget"):
        frostline.attach(trainer_for(tmp_path), "interlayer", share="auto")


def test_micro_batches_are_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD shows every factor in a gradient that Adam would hide."""

    def trained(folder: Path, steps: int) -> tuple[Any, list[int]]:
        trainer = trainer_for(folder, bert(), optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        seen: list[int] = []
        trainer.model.register_forward_pre_hook(
            lambda _, __, inputs: seen.append(len(inputs["labels"])) if torch.is_grad_enabled() else None,
            with_kwargs=True,
        )
        rows = trainer.args.per_device_train_batch_size // steps
        plan = MemoryPlan(10**9, rows, steps, "off", False, 1, 1, (Considered("off", False, rows, 1, 1.0),))
        monkeypatch.setattr(fitting, "plan_memory", lambda *_, **__: plan)
        frostline.attach(trainer, "none", memory={"budget": 10**9})
        seen.clear()  # looking for the stack runs the model
        trainer.train()
        return trainer, seen

    whole, large = trained(tmp_path / "a", 1)
    split, small = trained(tmp_path / "b", 4)
    assert small[-1] == large[-1] // 4
    assert len(small) >= 4 * whole.state.global_step
    assert split.state.global_step == whole.state.global_step
    for one, other in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_where_the_host_adds_losses_up_the_batch_is_not_split(tmp_path: Path) -> None:
    """BERT's classifier takes the number of items and does not divide by it: transformers then sums micro-batches."""
    trainer = trainer_for(tmp_path, bert(), gradient_accumulation_steps=2)
    assert not fitting._may_split(trainer)
    trainer.args.gradient_accumulation_steps = 1
    assert fitting._may_split(trainer)
    trainer.args.dataloader_drop_last = True
    assert not fitting._may_split(trainer)


def test_a_plan_of_another_batch_or_budget_is_made_anew(tmp_path: Path) -> None:
    budget = int(0.97 * plain_peak(tmp_path / "a"))
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_for(tmp_path / "b", max_steps=4, **settings)
    frostline.attach(trainer, "none", memory={"budget": budget})
    trainer.train()
    again = trainer_for(tmp_path / "b", max_steps=6, **settings)
    frost = frostline.attach(again, "none", memory={"budget": "1GiB"})
    again.train(resume_from_checkpoint=True)
    assert rows_of_a_budget(frost)[-1]["steps"] == 1


def test_a_plan_of_more_ranks_is_made_anew(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, max_steps=2, **settings)
    frostline.attach(trainer, "none", memory={"budget": "1GiB"})
    trainer.train()
    values, tensors = load_state(tmp_path / "checkpoint-2")
    values["memory"] |= {"ranks": 2, "peak": 1}
    save_state(tmp_path / "checkpoint-2", values, tensors)
    again = trainer_for(tmp_path, max_steps=3, **settings)
    frost = frostline.attach(again, "none", memory={"budget": "1GiB"})
    again.train(resume_from_checkpoint=True)
    plan = rows_of_a_budget(frost)[-1]
    assert plan["ranks"] == 1
    assert plan["peak"] > 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_optimizer_of_the_user_and_a_second_run(optimizer: Any, tmp_path: Path) -> None:
    model = bert()
    made = optimizer(model.parameters(), lr=1e-3)
    trainer = trainer_for(tmp_path, model, extra={"optimizers": (made, None)}, max_steps=2)
    frost = frostline.attach(trainer, "none", memory={"budget": "1GiB"})
    trainer.train()
    trainer.train()
    assert len(rows_of_a_budget(frost)) == 2


def test_a_model_that_checkpoints_already_goes_on_with_it(tmp_path: Path) -> None:
    model = bert(dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = trainer_for(tmp_path, model, max_steps=1)
    frost = frostline.attach(trainer, "none", memory={"budget": "1GiB"})
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not rows_of_a_budget(frost)[0]["considered"]


def test_a_resumed_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = int(0.97 * plain_peak(tmp_path / "a"))
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_for(tmp_path / "b", max_steps=4, **settings)
    frost = frostline.attach(trainer, "none", memory={"budget": budget})
    trainer.train()
    (plan,) = rows_of_a_budget(frost)
    monkeypatch.setattr(fitting, "plan_memory", lambda *_, **__: pytest.fail("measured again"))
    again = trainer_for(tmp_path / "b", max_steps=6, **settings)
    frost = frostline.attach(again, "none", memory={"budget": budget})
    again.train(resume_from_checkpoint=True)
    kept = rows_of_a_budget(frost)[-1]
    assert {key: kept[key] for key in plan if key != "time"} == {key: plan[key] for key in plan if key != "time"}


def test_budgets_that_cannot_be(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "a")
    frostline.attach(trainer, "none", memory={"budget": 1000})
    with pytest.raises(ConfigError, match=r"memory.budget=.* cannot be met: a step takes at least .* of it weights"):
        trainer.train()
    with pytest.raises(ConfigError, match="build the Trainer with model="):
        frostline.attach(
            trainer_for(tmp_path / "b", extra={"model_init": lambda: bert()}), "none", memory={"budget": "1GiB"}
        )
    with pytest.raises(ConfigError, match="budget"):
        frostline.attach(trainer_for(tmp_path / "c"), "none", memory={"budget": "-1"})
    with pytest.raises(ConfigError, match="needs a Hugging Face Trainer or a recipe"):
        frostline.Frostline(bert(), None, policy="none", memory={"budget": "1GiB"}, steps_per_epoch=1, epochs=1)
