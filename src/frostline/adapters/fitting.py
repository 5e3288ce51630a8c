"""A Trainer's run fitted into a memory budget, by steps that are measured before it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer

from frostline.adapters.measuring import (
    Frozen,
    bench_of,
    checkpointing_setting,
    cost_of_optimizer,
    freeze_heaviest,
    ignores_items,
    layer_sizes,
)
from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.distributed import Buckets, from_first
from frostline.errors import ConfigError
from frostline.freezer import Freezer
from frostline.memory import MemoryOptions
from frostline.memory.model import Way, end_checkpointing
from frostline.memory.planner import BudgetError, MemoryPlan, candidates, plan_memory
from frostline.policies.registry import create, validate
from frostline.state import has_state, load_state

__all__ = ["Fitting"]

logger = logging.getLogger("frostline")

# Whether the losses of micro-batches are divided already: an attribute of the Trainer since transformers 5.23.
_SCALED = "loss_is_scaled_for_ga"


class Fitting:
    """Keeps the runs of a Trainer within its memory budget, where it has one.

    Attributes:
        plan: of the run at hand; ``None`` without a budget.
    """

    def __init__(
        self, trainer: Trainer, memory: MemoryOptions, policy: str, options: Mapping[str, Any], blocks: str | None
    ) -> None:
        self._trainer, self._memory = trainer, memory
        self._policy, self._options, self._blocks = policy, dict(options), blocks
        self.plan: MemoryPlan | None = None
        if memory.budget is None:
            return
        if trainer.model_init is not None:
            raise ConfigError("memory.budget needs a model to measure: build the Trainer with model=, not model_init=")

    @property
    def level(self) -> str:
        """The level of compression that the run has."""
        return self.plan.level if self.plan is not None else self._memory.level

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the policy that the budget has chosen."""
        return self.plan.policy if self.plan is not None else {}

    @contextmanager
    def run(self, resume_from: Path | None) -> Iterator[None]:
        """The Trainer's settings are as the run fits; resumed, as it fitted before. The first rank says so for all.

        Raises:
            ConfigError: a budget that cannot be met, or a run that cannot be measured before it begins.
        """
        if self._memory.budget is None:
            yield
            return
        if self._trainer.args.world_size > 1:
            # The wrapper of an earlier run would count what is measured on one rank as used in its next step, in which
            # it may rest: the Trainer builds another.
            self._trainer.model_wrapped = cast(nn.Module, self._trainer.model)
        self.plan = from_first(lambda: self._planned(resume_from))
        logger.info("%s", self.plan)
        with _applied(self._trainer, self.plan):
            yield

    def _planned(self, resume_from: Path | None) -> MemoryPlan:
        """The plan of the checkpoint, where the run is still the same; else a new one."""
        args = self._trainer.args
        saved = load_state(resume_from)[0].get("memory") if resume_from is not None and has_state(resume_from) else None
        kept = MemoryPlan.from_numbers(saved) if saved else None
        choices = self._choices()
        if kept is not None and kept.policy in choices:
            before = (kept.budget, kept.rows * kept.steps, kept.ranks)
            if before == (self._memory.budget, args.per_device_train_batch_size, args.world_size):
                return kept
            choices = [kept.policy]  # a run goes on under the options with which it began
        state = capture()
        try:
            number, plan = _fit(
                self._trainer, self._memory, self._policy, [{**self._options, **one} for one in choices], self._blocks
            )
        finally:
            restore(state)  # data that draw random numbers have drawn some
        return replace(plan, policy=choices[number], ranks=args.world_size)

    def _choices(self) -> list[Mapping[str, Any]]:
        """What the budget may change in the policy's options."""
        pages = next(cast(nn.Module, self._trainer.model).parameters()).device.type != "cpu"
        return list(validate(self._policy, self._options).choices(pages=pages))


@contextmanager
def _applied(trainer: Trainer, plan: MemoryPlan) -> Iterator[None]:
    """The Trainer's settings follow ``plan`` for the length of a run."""
    args = trainer.args
    checkpointing = checkpointing_setting(args)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", checkpointing, f"{checkpointing}_kwargs")
    before = {name: getattr(args, name) for name in names}
    own = ("_train_batch_size", "model_accepts_loss_kwargs", _SCALED)
    kept = {name: getattr(trainer, name) for name in own if hasattr(trainer, name)}
    hooked = bool(getattr(trainer.model, "_require_grads_hooks", None))
    ignores = plan.steps > 1 and from_first(lambda: ignores_items(trainer))
    if plan.steps > 1:
        args.per_device_train_batch_size //= plan.steps
        args.gradient_accumulation_steps *= plan.steps
        # Its loader goes by a copy; Accelerate's own count stays 1, because the Trainer divides the loss itself.
        trainer._train_batch_size = args.train_batch_size
    if ignores:
        # Told that a model scales its loss by the number of items, the Trainer does not divide it; many do not.
        if _SCALED in kept:  # losses of ranks it goes on to add up
            setattr(trainer, _SCALED, False)
        else:
            trainer.model_accepts_loss_kwargs = False
    adds = plan.checkpointing and not before[checkpointing]
    if adds:
        setattr(args, checkpointing, True)
        setattr(args, f"{checkpointing}_kwargs", {"use_reentrant": False})
    try:
        yield
    finally:
        if adds:
            end_checkpointing(trainer.model, hooked=hooked)
        for name, value in before.items():
            setattr(args, name, value)
        for name, value in kept.items():
            setattr(trainer, name, value)


def _fit(
    trainer: Trainer, memory: MemoryOptions, policy: str, choices: Sequence[Mapping[str, Any]], blocks: str | None
) -> tuple[int, MemoryPlan]:
    """The first of several sets of options of a policy that can be made to fit (its number), and how."""
    model: Any = trainer.model
    stack = BlockStack.find(model, blocks)
    bench = bench_of(trainer, stack)
    cost, sizes = cost_of_optimizer(trainer, stack), None
    buckets = Buckets.of(model) if trainer.args.world_size > 1 else None
    failed: BudgetError | None = None
    for number, options in enumerate(choices):
        freezer = Freezer(stack)
        try:
            frozen = Frozen(cost)
            if policy != "none":
                sizes = sizes or layer_sizes(bench, trainer.args.per_device_train_batch_size)
                frozen = freeze_heaviest(freezer, create(policy, options, plan_for(stack, 1, 1, 1)), sizes, cost)
            return number, plan_memory(
                bench,
                _ways(trainer, memory),
                frozen.cost,
                budget=cast(int, memory.budget),
                rows=trainer.args.per_device_train_batch_size,
                resting=frozen.resting,
                held=frozen.held,
                buckets=replace(buckets, asleep=frozen.asleep) if buckets is not None else None,
                accumulates=trainer.args.gradient_accumulation_steps > 1,
                splits=_may_split(trainer),
            )
        except BudgetError as error:
            failed = error
        finally:
            freezer.release()
            model.zero_grad(set_to_none=True)
    assert failed is not None, "there is at least one choice"
    raise failed


def _ways(trainer: Trainer, memory: MemoryOptions) -> list[Way]:
    """The ways in which a step may be run, the present one first."""
    model: Any = trainer.model
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return candidates("off", checkpoints=False)  # the model's own, which stays as it is
    if getattr(trainer.args, checkpointing_setting(trainer.args)):
        return candidates("off", checkpoints=True)[1:]
    return candidates(memory.strongest, checkpoints=getattr(model, "supports_gradient_checkpointing", False))


def _may_split(trainer: Trainer) -> bool:
    """Whether smaller micro-batches are the same training."""
    model: Any = trainer.model
    if trainer.args.dataloader_drop_last:  # another part of each epoch would be dropped
        return False
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    # Of losses that are not divided the Trainer adds up those of its micro-batches: more of them would be another sum.
    # It adds up those of ranks, too, and an older one cannot be made to divide without ceasing to.
    adds_up = trainer.args.world_size > 1 and not hasattr(trainer, _SCALED)
    adds_up = adds_up or trainer.args.gradient_accumulation_steps > 1
    return not adds_up or not ignores_items(trainer)
