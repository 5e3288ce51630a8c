"""What the law tests share: optimizers, training loops, and what a run leaves to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers.optimization
from torch import Tensor, nn

from frostline.blocks import BlockStack
from frostline.freezer import Freezer
from frostline.policies.base import Decision
from tests.architectures import Architecture

Optimizer = torch.optim.Optimizer

# Each has momentum or weight decay, so that a zero or stale gradient would move a parameter.
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "adafactor-hf": lambda p: transformers.optimization.Adafactor(p, weight_decay=0.1, beta1=0.9),
}


@dataclass(frozen=True)
class Loop:
    """One way to take a training step; the same random state gives the same step."""

    name: str = "plain"
    clip: float | None = None
    accumulation: int = 1
    autocast: bool = False
    scaled: bool = False
    set_to_none: bool = True

    def step(self, model: nn.Module, optimizer: Optimizer, batches: list[dict[str, Tensor]]) -> float:
        """One optimizer step over ``accumulation`` batches; the loop calls ``model.train()``, as loops do."""
        model.train()
        scaler = torch.amp.GradScaler("cpu", enabled=self.scaled, init_scale=64.0)
        total = 0.0
        for batch in batches[: self.accumulation]:
            with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext():
                loss = model(**batch).loss
            scaler.scale(loss / self.accumulation).backward()
            total += float(loss.detach())
        if self.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=self.set_to_none)
        return total


LOOPS = (
    Loop("clip", clip=0.01),
    Loop("accumulate", accumulation=3),
    Loop("autocast", autocast=True),
    Loop("scaler", scaled=True, clip=0.1),
    Loop("zeroed", set_to_none=False),
    Loop("everything", clip=0.1, accumulation=2, autocast=True, scaled=True, set_to_none=False),
)


class Run:
    """A model, its stack, an optimizer and a freezer, with a batch generator and a loop."""

    def __init__(self, architecture: Architecture, optimizer: str = "sgd", loop: Loop | None = None) -> None:
        self.architecture = architecture
        self.loop = loop or Loop()
        self.model = architecture.build()
        self.stack = BlockStack.find(self.model, architecture.path)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.freezer = Freezer(self.stack, self.optimizer)
        self.steps = 0

    def train(self, steps: int) -> None:
        """Take ``steps`` steps, each on fresh batches."""
        for _ in range(steps):
            first = self.steps * self.loop.accumulation
            batches = [self.architecture.inputs(seed=first + i) for i in range(self.loop.accumulation)]
            self.loop.step(self.model, self.optimizer, batches)
            self.steps += 1

    def freeze(self, depth: int, *resting: str) -> None:
        """Apply ``Decision(depth, resting)``."""
        self.freezer.apply(Decision(depth, frozenset(resting)))

    def state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of one parameter (empty: none)."""
        return self.optimizer.state.get(dict(self.model.named_parameters())[name], {})

    def trainable(self) -> set[str]:
        """Names of the parameters that require gradients now."""
        return {n for n, p in self.model.named_parameters() if p.requires_grad}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """16 single rows of an architecture's input, for hosts that batch themselves."""

    def __init__(self, architecture: Architecture) -> None:
        batch = architecture.inputs(16, seed=3)
        self.rows = [{k: v[i] for k, v in batch.items()} for i in range(16)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def prefix_buffers(stack: BlockStack, depth: int) -> dict[str, Tensor]:
    """A copy of every buffer of the frozen blocks, and of the modules that own a parameter below the line."""
    owners = {name.rpartition(".")[0] for name in stack.prefix_parameters(depth)}
    inside = tuple(f"{path}." for path in stack.block_paths[:depth])
    return {
        name: buffer.detach().clone()
        for name, buffer in stack.model.named_buffers()
        if name.startswith(inside) or name.rpartition(".")[0] in owners
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names whose bits differ."""
    return {n for n in before if not torch.equal(before[n], after[n])}


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


@contextmanager
def crossing(block: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect, per forward pass, every tensor that enters ``block`` (the hidden state, masks, biases)."""
    seen: list[list[Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append([*tensors(args), *tensors(kwargs)])

    # Last of all hooks: what the block really receives.
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def hidden_at(run: Run, depth: int, seed: int = 0) -> Tensor:
    """The hidden state that crosses the frost line for one fixed batch in train mode, under a fresh random state."""
    run.model.train()
    with crossing(run.stack.blocks[depth]) as seen:
        run.model(**run.architecture.inputs(seed=seed))
    assert seen, "the block at the frost line did not run"
    return next(t for t in seen[0] if t.is_floating_point()).detach().clone()


def installed(model: nn.Module, optimizer: Optimizer | None = None, *, identity: bool = True) -> dict[str, Any]:
    """Everything that could be hung on a model or an optimizer, as comparable values.

    Instance attributes of every module (their identity too, so that a replaced method shows), every hook
    dictionary, hooks and attributes of parameters, global module hooks, and the optimizer's own. Without
    ``identity`` functions compare by name, for two models side by side.
    """
    mark: Callable[[Any], Any] = id if identity else lambda f: getattr(f, "__qualname__", type(f).__qualname__)

    def own(thing: Any) -> tuple[Any, ...]:
        values = vars(thing)
        hooks = {k: [mark(f) for f in v.values()] for k, v in values.items() if "hook" in k and isinstance(v, dict)}
        methods = {k: mark(v) for k, v in values.items() if callable(v) and not isinstance(v, nn.Module)}
        return type(thing), sorted(values), hooks, methods

    found: dict[str, Any] = {"class": type(model), "global": own(torch.nn.modules.module)[2]}
    for name, module in model.named_modules():
        found[f"module {name}"] = own(module)
    for name, parameter in model.named_parameters():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        who = id(parameter) if identity else parameter.shape
        found[f"parameter {name}"] = (
            who,
            parameter.requires_grad,
            [[mark(f) for f in (h or {}).values()] for h in hooks],
            sorted(vars(parameter)),
        )
    if optimizer is not None:
        found["optimizer"] = own(optimizer)
    return found
