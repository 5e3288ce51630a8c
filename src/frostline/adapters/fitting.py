"""A Trainer's run fitted into a memory budget: the longest batches that its data bring, measured before it trains."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from frostline.blocks import BlockStack
from frostline.engine import plan_for
from frostline.errors import ConfigError, FrostlineError
from frostline.freezer import Freezer
from frostline.memory import MemoryOptions
from frostline.memory.model import Bench, OptimizerCost, end_checkpointing, nbytes_of, optimizer_cost
from frostline.memory.planner import MemoryPlan, candidates, plan_memory
from frostline.policies.registry import create
from frostline.state import has_state, load_state

__all__ = ["Fitting"]

logger = logging.getLogger("frostline")

# Rows of the training data that are looked through for the longest ones.
_LOOKED_AT = 10_000


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
        if memory.budget is not None and trainer.model_init is not None:
            raise ConfigError("memory.budget needs a model to measure: build the Trainer with model=, not model_init=")

    @property
    def level(self) -> str:
        """The level of compression that the run has."""
        return self.plan.level if self.plan is not None else self._memory.level

    @contextmanager
    def run(self, resume_from: Path | None) -> Iterator[None]:
        """The Trainer's settings are as the run fits; resumed, as it fitted before.

        Raises:
            ConfigError: a budget that cannot be met, or a run that cannot be measured before it begins.
        """
        if self._memory.budget is None:
            yield
            return
        saved = load_state(resume_from)[0].get("memory") if resume_from is not None and has_state(resume_from) else None
        self.plan = MemoryPlan.from_numbers(saved) if saved else self._agreed()
        logger.info("%s", self.plan)
        with _applied(self._trainer, self.plan):
            yield

    def _agreed(self) -> MemoryPlan:
        """With several ranks rank 0 measures and says."""
        found: list[Any] = [None]
        ranks = dist.is_initialized() and dist.get_world_size() > 1
        if not ranks or dist.get_rank() == 0:
            try:
                found = [_fit(self._trainer, self._memory, self._policy, self._options, self._blocks)]
            except FrostlineError as error:
                # The others are waiting: they must hear of it.
                found = [error]
        if ranks:
            dist.broadcast_object_list(found)
        if isinstance(found[0], FrostlineError):
            raise found[0]
        plan: MemoryPlan = found[0]
        return plan


@contextmanager
def _applied(trainer: Trainer, plan: MemoryPlan) -> Iterator[None]:
    """The Trainer's settings follow ``plan`` for the length of a run."""
    args = trainer.args
    checkpointing = _checkpointing(args)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", checkpointing, f"{checkpointing}_kwargs")
    before = {name: getattr(args, name) for name in names}
    accumulation = trainer.accelerator.gradient_accumulation_steps
    hooked = bool(getattr(trainer.model, "_require_grads_hooks", None))
    if plan.steps > 1:
        args.per_device_train_batch_size //= plan.steps
        args.gradient_accumulation_steps *= plan.steps
        trainer.accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
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
        trainer.accelerator.gradient_accumulation_steps = accumulation


def _fit(
    trainer: Trainer, memory: MemoryOptions, policy: str, options: Mapping[str, Any], blocks: str | None
) -> MemoryPlan:
    assert memory.budget is not None
    model: Any = trainer.model
    args = trainer.args
    stack = BlockStack.find(model, blocks)
    frozen = None
    resting = 0
    if policy != "none":
        chosen = create(policy, options, plan_for(stack, 1, 1, 1))
        frozen, decision = Freezer(stack), chosen.start()
        frozen.apply(decision)
        if chosen.moments == "keep":
            resting = nbytes_of(p for name, p in model.named_parameters() if name in decision.resting)
    try:
        if getattr(args, _checkpointing(args)):
            ways = candidates("off", checkpoints=True)[1:]
        else:
            ways = candidates(memory.strongest, checkpoints=getattr(model, "supports_gradient_checkpointing", False))
        return plan_memory(
            Bench(stack, _longest(trainer), trainer.compute_loss_context_manager),
            ways,
            _optimizer_cost(trainer, stack),
            budget=memory.budget,
            rows=args.per_device_train_batch_size,
            resting=resting,
            accumulates=args.gradient_accumulation_steps > 1,
            splits=not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        )
    finally:
        if frozen is not None:
            frozen.release()
        model.zero_grad(set_to_none=True)


def _checkpointing(args: TrainingArguments) -> str:
    """The setting's name: transformers has renamed it, and looks at the new one only."""
    return "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"


def _longest(trainer: Trainer) -> Any:
    """A function from a number of samples to the largest batch of that many that the data bring."""
    data = trainer.train_dataset
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ConfigError("memory.budget: a stream cannot be looked through for its longest batch; set memory.level")
    if hasattr(data, "column_names"):
        data = trainer._remove_unused_columns(data, description="training")
    most = 2 * trainer.args.per_device_train_batch_size
    rows = heapq.nlargest(most, range(min(len(data), _LOOKED_AT)), key=lambda row: _size(data[row]))

    def batch(count: int) -> dict[str, Any]:
        chosen = [data[rows[number % len(rows)]] for number in range(count)]
        inputs = trainer._prepare_inputs(trainer.data_collator(chosen))
        if not isinstance(inputs, Mapping) or "labels" not in inputs:
            raise ConfigError("memory.budget: the data bring no 'labels', so no loss can be measured; set memory.level")
        return dict(inputs)

    return batch


def _size(row: Any) -> int:
    """How much of a batch a row makes out."""
    values = row.values() if isinstance(row, Mapping) else row if isinstance(row, (tuple, list)) else (row,)
    return sum(
        value.numel() if isinstance(value, Tensor) else len(value) for value in values if hasattr(value, "__len__")
    )


def _optimizer_cost(trainer: Trainer, stack: BlockStack) -> OptimizerCost:
    """Of the Trainer's optimizer, measured on the largest weight of the last block."""
    model: Any = trainer.model
    if trainer.optimizer is not None:
        kind, settings = type(trainer.optimizer), dict(trainer.optimizer.defaults)
    else:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    sample = max(stack.parameters_of(len(stack) - 1).values(), key=Tensor.numel)

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(parameters, **settings)
        return optimizer

    return optimizer_cost(build, sample)
