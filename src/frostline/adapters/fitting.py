"""A Trainer's run fitted into a memory budget: the longest batches that its data bring, measured before it trains."""

from __future__ import annotations

import contextlib
import heapq
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.errors import ConfigError
from frostline.freezer import Freezer
from frostline.memory import MemoryOptions
from frostline.memory.model import Bench, OptimizerCost, Way, end_checkpointing, nbytes_of, optimizer_cost
from frostline.memory.planner import BudgetError, MemoryPlan, candidates, plan_memory
from frostline.policies.base import Policy
from frostline.policies.registry import create, validate
from frostline.state import has_state, load_state
from frostline.trace import first_tensor

__all__ = ["Fitting", "bench_of", "cost_of_optimizer", "way_of"]

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

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the policy that the budget has chosen."""
        return self.plan.policy if self.plan is not None else {}

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
        choices = self._choices()
        if self.plan is not None and self.plan.policy in choices:
            choices = [self.plan.policy]  # a run goes on under the options with which it began
        else:
            self.plan = None
        if self.plan is None or (self.plan.budget, self.plan.rows * self.plan.steps) != (self._memory.budget, batch):
            state = capture()
            try:
                number, plan = _fit(
                    self._trainer,
                    self._memory,
                    self._policy,
                    [{**self._options, **one} for one in choices],
                    self._blocks,
                )
                self.plan = replace(plan, policy=choices[number])
            finally:
                restore(state)  # data that draw random numbers have drawn some
        logger.info("%s", self.plan)
        with _applied(self._trainer, self.plan):
            yield

    def _choices(self) -> list[Mapping[str, Any]]:
        """What the budget may change in the policy's options."""
        pages = next(cast(nn.Module, self._trainer.model).parameters()).device.type != "cpu"
        return list(validate(self._policy, self._options).choices(pages=pages))


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
    trainer: Trainer, memory: MemoryOptions, policy: str, choices: Sequence[Mapping[str, Any]], blocks: str | None
) -> tuple[int, MemoryPlan]:
    """The first of several sets of options of a policy that can be made to fit (its number), and how."""
    model: Any = trainer.model
    stack = BlockStack.find(model, blocks)
    bench = bench_of(trainer, stack)
    cost, sizes = cost_of_optimizer(trainer, stack), None
    failed: BudgetError | None = None
    for number, options in enumerate(choices):
        freezer = Freezer(stack)
        try:
            frozen = _Frozen(cost)
            if policy != "none":
                sizes = sizes or _sizes(bench, trainer.args.per_device_train_batch_size)
                frozen = _freeze(freezer, create(policy, options, plan_for(stack, 1, 1, 1)), sizes, cost)
            return number, plan_memory(
                bench,
                _ways(trainer, memory),
                frozen.cost,
                budget=cast(int, memory.budget),
                rows=trainer.args.per_device_train_batch_size,
                resting=frozen.resting,
                held=frozen.held,
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


def bench_of(trainer: Trainer, stack: BlockStack) -> Bench:
    """Runs steps of the Trainer's model as the Trainer would, on the longest batches that its data bring.

    Raises:
        ConfigError: its data are a stream.
    """
    return Bench(
        stack,
        _longest(trainer),
        # Not the Trainer's own context: in transformers 5 it is empty, and autocast comes with the wrapped model.
        lambda inputs: cast(Tensor, trainer.compute_loss(cast(nn.Module, trainer.model), dict(inputs))),
        trainer.accelerator.autocast,
    )


def way_of(trainer: Trainer, level: str) -> Way:
    """How the Trainer runs a step, as its settings are, at a level of compression."""
    return Way(level, bool(getattr(trainer.args, _checkpointing(trainer.args))))


class _Frozen(NamedTuple):
    """What a policy's heaviest decision leaves to count: see :class:`~frostline.memory.model.MemoryModel`."""

    cost: OptimizerCost
    resting: int = 0
    held: int = 0


def _freeze(freezer: Freezer, policy: Policy[Any], sizes: Mapping[str, int], cost: OptimizerCost) -> _Frozen:
    """Let the model be what ``policy`` makes of it where it takes most."""
    stack = freezer.stack
    trains = {name: parameter for name, parameter in stack.model.named_parameters() if parameter.requires_grad}
    decision = policy.heaviest(sizes)
    freezer.apply(decision)
    below = stack.prefix_parameters(decision.depth)
    resting = held = 0
    if policy.moments == "keep":
        resting = nbytes_of(p for name, p in trains.items() if not p.requires_grad and name not in below)
    if "gradient_sum" in policy.needs:  # in fp32, of the blocks
        held = sum(
            4 * p.numel() for name, p in trains.items() if p.requires_grad and isinstance(stack.owners[name], int)
        )
    copies = 1 if "weight_change" in policy.needs else 0  # of what trains, for the length of the optimizer's step
    return _Frozen(OptimizerCost(cost.state, cost.step + copies), resting, held)


def _sizes(bench: Bench, rows: int) -> dict[str, int]:
    """Bytes that each parameter takes when it trains: a gradient, moments, and the input that its module then keeps."""
    inputs: dict[nn.Module, int] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = first_tensor(args, kwargs)
        inputs[module] = given.numel() * given.element_size() if given is not None else 0

    owners = {
        f"{path}.{name}".lstrip("."): (module, parameter)
        for path, module in bench.model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    few = min(2, rows)
    with contextlib.ExitStack() as hooks:
        for module in {module for module, _ in owners.values()}:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        with bench.ready(Way()), torch.no_grad():
            bench.forward(Way(), bench.batch(few))
    return {
        name: nbytes_of([parameter]) + inputs.get(module, 0) * rows // few
        for name, (module, parameter) in owners.items()
    }


def _ways(trainer: Trainer, memory: MemoryOptions) -> list[Way]:
    """The ways in which a step may be run, the present one first."""
    model: Any = trainer.model
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return candidates("off", checkpoints=False)  # the model's own, which stays as it is
    if getattr(trainer.args, _checkpointing(trainer.args)):
        return candidates("off", checkpoints=True)[1:]
    return candidates(memory.strongest, checkpoints=getattr(model, "supports_gradient_checkpointing", False))


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


def cost_of_optimizer(trainer: Trainer, stack: BlockStack) -> OptimizerCost:
    """What the Trainer's optimizer takes, measured on the largest weight of the last block."""
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
