"""A model in training with the cache or without, for the tests of the storage manager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from frostline.blocks import BlockStack
from frostline.cache import CacheManager, CacheOptions
from frostline.cache.store import Store
from frostline.clock import Clock
from frostline.freezer import Freezer
from frostline.policies.base import Decision
from tests.architectures import Architecture
from tests.laws.loops import OPTIMIZERS

SAMPLES, ROWS = 12, 4


class Side:
    """A model in training, with the cache or without."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        cached: bool,
        store: Store | None = None,
        options: CacheOptions | None = None,
        epochs: float = 1e9,
        sized: bool = True,
    ) -> None:
        self.architecture = architecture
        self.model = architecture.build()
        self.stack = BlockStack.find(self.model, architecture.path)
        self.optimizer = OPTIMIZERS["sgd"](self.model.parameters())
        self.freezer = Freezer(self.stack, self.optimizer)
        self.events: list[dict[str, Any]] = []
        self.limits: list[str] = []
        self.clock = Clock(SAMPLES // ROWS, epochs, ROWS, sized=sized)
        self.cache: CacheManager | None = None
        if cached:
            self.cache = CacheManager(
                self.stack,
                options or CacheOptions(mode="memory"),
                self.clock,
                report=lambda action, **numbers: self.events.append({"action": action, **numbers}),
                limit=lambda code, message: self.limits.append(f"{code}: {message}"),
                store=store,
            )

    def freeze(self, depth: int) -> None:
        self.freezer.apply(Decision(depth))
        if self.cache is not None:
            self.cache.moved(self.stack, depth)

    def step(self, batch: dict[str, Tensor], seed: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one batch under a given random state; the optimizer has not stepped yet."""
        self.model.train()
        self.optimizer.zero_grad()
        transformers.set_seed(seed)
        loss = self.model(**batch).loss
        loss.backward()
        self.clock.step += 1
        return float(loss.detach()), {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def follow(self, other: Side) -> None:
        """Teacher forcing: take over what the other side has learned."""
        theirs = dict(other.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(theirs[name])
            buffers = dict(other.model.named_buffers())
            prefix = {id(b) for m in self.stack.prefix_modules(self.freezer.depth) for b in m.buffers()}
            for name, buffer in self.model.named_buffers():
                if id(buffer) not in prefix:
                    buffer.copy_(buffers[name])

    def counts(self) -> Counter[str]:
        assert self.cache is not None
        return self.cache.counts


def batch_of(architecture: Architecture, rows: list[int]) -> dict[str, Tensor]:
    data = architecture.inputs(SAMPLES, seed=7)
    return {name: value[rows] for name, value in data.items()}


@contextmanager
def calls(stack: BlockStack) -> Iterator[Counter[int]]:
    """How often the inside of each block ran."""
    seen: Counter[int] = Counter()

    def note(index: int) -> Any:
        return lambda *_: seen.update([index])

    handles = []
    for index, block in enumerate(stack.blocks):
        inner = next(m for m in block.modules() if m is not block and list(m.parameters(recurse=False)))
        handles.append(inner.register_forward_pre_hook(note(index)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
