"""What a Trainer's run takes, measured before it trains: on its own model, and the longest batches of its own data."""

from __future__ import annotations

import contextlib
import heapq
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.distributed import Buckets
from frostline.errors import ConfigError
from frostline.freezer import Freezer
from frostline.memory.model import Bench, MemoryModel, OptimizerCost, Way, nbytes_of, optimizer_cost
from frostline.policies.base import Decision, Policy
from frostline.policies.registry import create
from frostline.statistics import compared
from frostline.trace import first_tensor

__all__ = [
    "Frozen",
    "bench_of",
    "checkpointing_setting",
    "cost_of_optimizer",
    "freeze_heaviest",
    "ignores_items",
    "layer_sizes",
    "peaks_of",
    "readable",
    "row_seconds",
    "way_of",
]

logger = logging.getLogger("frostline")

# Rows of the training data that are looked through for the longest ones.
_LOOKED_AT = 10_000


def peaks_of(
    trainer: Trainer, level: str, policy: str, options: Mapping[str, Any], blocks: str | None, rows: Sequence[int]
) -> list[list[int]]:
    """Measure what a step of ``trainer`` takes, before it trains: bytes at its peak, by depth, then by ``rows``.

    Its model and the random state are as before afterwards.

    Args:
        trainer: not wrapped yet.
        level: of compression.
        policy: name of one that freezes.
        options: of the policy.
        blocks: dotted path of the list of blocks, where the model has several or none is found.
        rows: sizes of the micro-batches; the first is the present one.

    Raises:
        ConfigError: the data are a stream.
    """
    with _measuring(trainer, blocks) as (stack, freezer):
        bench, way = bench_of(trainer, stack), way_of(trainer, level)
        buckets = Buckets.of(stack.model) if trainer.args.world_size > 1 else None
        sizes, cost = layer_sizes(bench, rows[0]), cost_of_optimizer(trainer, stack)
        frozen = freeze_heaviest(freezer, create(policy, options, plan_for(stack, 1, 1, 1)), sizes, cost)
        buckets = replace(buckets, asleep=frozen.asleep) if buckets is not None else None
        found = MemoryModel.measure(bench, (), frozen.cost, frozen.resting, frozen.held, buckets)
        found.activations[way] = found.calibrated(bench, way, rows[0])
        accumulates = trainer.args.gradient_accumulation_steps > 1
        return [
            [found.peak(way, size, depth, accumulates=accumulates) for size in rows] for depth in range(len(stack) + 1)
        ]


def row_seconds(trainer: Trainer, level: str, blocks: str | None, few: int, many: int) -> float:
    """Seconds of the forward and backward pass for each further row of a micro-batch, only the last block training.

    The same samples are run in one micro-batch of ``many`` rows and in several of ``few``: a larger one is padded more,
    and does more at once. Model and random state are as before afterwards.

    Args:
        trainer: not wrapped yet.
        level: of compression.
        blocks: dotted path of the list of blocks.
        few: rows of the smaller size; equal sizes are compared with no rows at all.
        many: rows of the larger size, so many times ``few``.
    """
    with _measuring(trainer, blocks) as (stack, freezer):
        way = way_of(trainer, level)
        freezer.apply(Decision(len(stack) - 1))
        parts = range(many // few)
        apart = [
            bench_of(trainer, stack, _ordinary(trainer, many, part, len(parts))).seconds(way, few) for part in parts
        ]
        if len(parts) == 1:
            return apart[0] / few
        together = bench_of(trainer, stack, _ordinary(trainer, many)).seconds(way, many)
        return (together - sum(apart) / len(apart)) / (many - few)


@contextlib.contextmanager
def _measuring(trainer: Trainer, blocks: str | None) -> Iterator[tuple[BlockStack, Freezer]]:
    """The Trainer's blocks and what freezes them, while something is measured."""
    model: Any = trainer.model
    stack, state = BlockStack.find(model, blocks), capture()
    freezer = Freezer(stack)
    try:
        yield stack, freezer
    finally:
        freezer.release()
        model.zero_grad(set_to_none=True)
        restore(state)


def bench_of(trainer: Trainer, stack: BlockStack, batch: Callable[[int], Mapping[str, Any]] | None = None) -> Bench:
    """Runs steps of the Trainer's model as the Trainer would.

    Args:
        trainer: whose model is not wrapped yet.
        stack: of its model.
        batch: of that many samples. Default: the longest that its data bring.

    Raises:
        ConfigError: its data are a stream.
    """
    model: Any = trainer.model
    return Bench(
        stack,
        batch or _longest(trainer),
        # Not the Trainer's own context: in transformers 5 it is empty, and autocast comes with the wrapped model.
        lambda inputs: cast(Tensor, trainer.compute_loss(model, dict(inputs))),
        trainer.accelerator.autocast,
    )


class Frozen(NamedTuple):
    """What a policy's heaviest decision leaves to count: see :class:`~frostline.memory.model.MemoryModel`.

    ``asleep``: bytes of what rests and stays in a data-parallel wrapper (:class:`~frostline.distributed.Buckets`).
    """

    cost: OptimizerCost
    resting: int = 0
    held: int = 0
    asleep: int = 0


def freeze_heaviest(freezer: Freezer, policy: Policy[Any], sizes: Mapping[str, int], cost: OptimizerCost) -> Frozen:
    """Let the model be what ``policy`` makes of it where it takes most."""
    stack = freezer.stack
    trains = {name: parameter for name, parameter in stack.model.named_parameters() if parameter.requires_grad}
    decision = policy.heaviest(sizes)
    freezer.apply(decision)
    below = stack.prefix_parameters(decision.depth)
    rests = nbytes_of(p for name, p in trains.items() if not p.requires_grad and name not in below)
    resting = rests if policy.moments == "keep" else 0
    cadence, held = policy.cadence(), 0
    asleep = rests if cadence is not None and cadence.restless else 0
    if "gradient_sum" in policy.needs:  # in fp32, of the blocks
        held = sum(
            4 * p.numel() for name, p in trains.items() if p.requires_grad and isinstance(stack.owners[name], int)
        )
    copies = 0.0
    if "weight_change" in policy.needs:  # for the length of the optimizer's step
        active = [p for p in trains.values() if p.requires_grad]
        copied = sum(values.numel() * values.element_size() for values in map(compared, active))
        copies = copied / max(1, nbytes_of(active))
    return Frozen(OptimizerCost(cost.state, cost.step + copies), resting, held, asleep)


def layer_sizes(bench: Bench, rows: int) -> dict[str, int]:
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


def checkpointing_setting(args: TrainingArguments) -> str:
    """The setting's name: transformers has renamed it, and looks at the new one only."""
    return "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"


@torch.no_grad()
def ignores_items(trainer: Trainer) -> bool:
    """Whether the model takes the number of items in a batch, and does not scale its loss by it."""
    if not trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
        return False
    model: Any = trainer.model
    data, collate = readable(trainer)
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


def readable(trainer: Trainer) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The training data, and what makes a batch of some of their rows, as the Trainer's own loader does."""
    data: Any = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ConfigError("memory.budget: a stream cannot be looked through for its longest batch; set memory.level")
    if hasattr(data, "column_names"):
        return trainer._remove_unused_columns(data, description="training"), trainer.data_collator
    return data, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def way_of(trainer: Trainer, level: str) -> Way:
    """How the Trainer runs a step, as its settings are, at a level of compression."""
    return Way(level, bool(getattr(trainer.args, checkpointing_setting(trainer.args))))


def _longest(trainer: Trainer) -> Callable[[int], Mapping[str, Any]]:
    """A function from a number of samples to the largest batch of that many that the data bring."""
    data, collate = readable(trainer)
    looked = range(0, len(data), max(1, len(data) // _LOOKED_AT))
    if len(looked) < len(data):
        logger.info("the longest of %d rows of %d stand for all of them", len(looked), len(data))
    rows = heapq.nlargest(trainer.args.per_device_train_batch_size, looked, key=lambda row: _size(data[row]))
    return lambda count: trainer._prepare_inputs(collate([data[rows[n % len(rows)]] for n in range(count)]))


def _ordinary(trainer: Trainer, many: int, first: int = 0, step: int = 1) -> Callable[[int], Mapping[str, Any]]:
    """A function that makes a batch: of ``many`` samples from all over the data, each ``step``-th from ``first`` on."""
    data, collate = readable(trainer)
    rows = [number * len(data) // many for number in range(first, many, step)]
    return lambda _: trainer._prepare_inputs(collate([data[row] for row in rows]))


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
