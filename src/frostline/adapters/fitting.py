"""A Trainer's run fitted into a memory budget: the longest batches that its data bring, measured before it trains."""

from __future__ import annotations

import heapq
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.engine import plan_for
from frostline.errors import ConfigError
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
        if memory.budget is None:
            return
        if trainer.model_init is not None:
            raise ConfigError("memory.budget needs a model to measure: build the Trainer with model=, not model_init=")
        if trainer.args.world_size > 1:
            raise ConfigError("memory.budget is for one process in this version: with several ranks set memory.level")

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
        batch = self._trainer.args.per_device_train_batch_size
        saved = load_state(resume_from)[0].get("memory") if resume_from is not None and has_state(resume_from) else None
        self.plan = MemoryPlan.from_numbers(saved) if saved else None
        if self.plan is None or (self.plan.budget, self.plan.rows * self.plan.steps) != (self._memory.budget, batch):
            state = capture()
            try:
                self.plan = _fit(self._trainer, self._memory, self._policy, self._options, self._blocks)
            finally:
                restore(state)  # data that draw random numbers have drawn some
        logger.info("%s", self.plan)
        with _applied(self._trainer, self.plan):
            yield


@contextmanager
def _applied(trainer: Trainer, plan: MemoryPlan) -> Iterator[None]:
    """The Trainer's settings follow ``plan`` for the length of a run."""
    args = trainer.args
    checkpointing = _checkpointing(args)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", checkpointing, f"{checkpointing}_kwargs")
    before = {name: getattr(args, name) for name in names}
    size, accepts = trainer._train_batch_size, trainer.model_accepts_loss_kwargs
    hooked = bool(getattr(trainer.model, "_require_grads_hooks", None))
    ignores = plan.steps > 1 and _ignores_items(trainer)
    if plan.steps > 1:
        args.per_device_train_batch_size //= plan.steps
        args.gradient_accumulation_steps *= plan.steps
        # Its loader goes by a copy; Accelerate's own count stays 1, because the Trainer divides the loss itself.
        trainer._train_batch_size = args.train_batch_size
        # Told that a model scales its loss by the number of items, the Trainer does not divide it; many do not.
        trainer.model_accepts_loss_kwargs = accepts and not ignores
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
        trainer._train_batch_size, trainer.model_accepts_loss_kwargs = size, accepts


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
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            ways = candidates("off", checkpoints=False)  # the model's own, which stays as it is
        elif getattr(args, _checkpointing(args)):
            ways = candidates("off", checkpoints=True)[1:]
        else:
            ways = candidates(memory.strongest, checkpoints=getattr(model, "supports_gradient_checkpointing", False))
        return plan_memory(
            # Not the Trainer's own context: in transformers 5 it is empty, and autocast comes with the wrapped model.
            Bench(
                stack,
                _longest(trainer),
                lambda inputs: cast(Tensor, trainer.compute_loss(model, dict(inputs))),
                trainer.accelerator.autocast,
            ),
            ways,
            _optimizer_cost(trainer, stack),
            budget=memory.budget,
            rows=args.per_device_train_batch_size,
            resting=resting,
            accumulates=args.gradient_accumulation_steps > 1,
            splits=_may_split(trainer),
        )
    finally:
        if frozen is not None:
            frozen.release()
        model.zero_grad(set_to_none=True)


def _checkpointing(args: TrainingArguments) -> str:
    """The setting's name: transformers has renamed it, and looks at the new one only."""
    return "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"


def _may_split(trainer: Trainer) -> bool:
    """Whether smaller micro-batches are the same training."""
    model: Any = trainer.model
    if trainer.args.dataloader_drop_last:  # another part of each epoch would be dropped
        return False
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return False
    # Of losses that are not divided the Trainer adds up those of its micro-batches: more of them would be another sum.
    return trainer.args.gradient_accumulation_steps == 1 or not _ignores_items(trainer)


@torch.no_grad()
def _ignores_items(trainer: Trainer) -> bool:
    """Whether the model takes the number of items in a batch, and does not scale its loss by it."""
    if not trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
        return False
    model: Any = trainer.model
    data, collate = _readable(trainer)
    training, state = model.training, capture()
    try:
        inputs = trainer._prepare_inputs(collate([data[0]]))
        model.eval()
        one, two = (
            trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(count, device=model.device))
            for count in (1, 2)
        )
    finally:
        model.train(training)
        restore(state)
    return bool(torch.equal(cast(Tensor, one), cast(Tensor, two)))


def _readable(trainer: Trainer) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The training data, and what makes a batch of some of their rows, as the Trainer's own loader does."""
    data: Any = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ConfigError("memory.budget: a stream cannot be looked through for its longest batch; set memory.level")
    if hasattr(data, "column_names"):
        return trainer._remove_unused_columns(data, description="training"), trainer.data_collator
    return data, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def _longest(trainer: Trainer) -> Callable[[int], Mapping[str, Any]]:
    """A function from a number of samples to the largest batch of that many that the data bring."""
    data, collate = _readable(trainer)
    looked = range(0, len(data), max(1, len(data) // _LOOKED_AT))
    if len(looked) < len(data):
        logger.info("the longest of %d rows of %d stand for all of them", len(looked), len(data))
    rows = heapq.nlargest(trainer.args.per_device_train_batch_size, looked, key=lambda row: _size(data[row]))
    return lambda count: trainer._prepare_inputs(collate([data[rows[n % len(rows)]] for n in range(count)]))


def _size(row: Any) -> int:
    """How much of a batch a row makes out."""
    values = row.values() if isinstance(row, Mapping) else row if isinstance(row, (tuple, list)) else (row,)
    return sum(
        value.numel() if isinstance(value, Tensor) else len(value) for value in values if hasattr(value, "__len__")
    )


def _optimizer_cost(trainer: Trainer, stack: BlockStack) -> OptimizerCost:
    """Of the Trainer's optimizer, measured on the largest weight of the last block."""
    model: Any = trainer.model
    optimizer: Any = trainer.optimizer
    if optimizer is not None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper, after a first run
        kind, settings = type(optimizer), dict(optimizer.defaults)
    else:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    # What an optimizer says of its groups is more than it takes when it is made.
    taken = inspect.signature(kind).parameters
    settings = {name: value for name, value in settings.items() if name in taken}
    weights = [p for p in stack.parameters_of(len(stack) - 1).values() if p.is_floating_point()]
    sample = max(weights, key=lambda p: (p.requires_grad, p.numel()))
    return optimizer_cost(lambda parameters: kind(parameters, **settings), sample)
