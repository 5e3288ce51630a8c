"""A cached run and the same without a cache, side by side: what the tests of the manager start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline.cache import CacheOptions
from frostline.cache.tiers import disk_of
from tests.architectures import ARCHITECTURES, Architecture
from tests.cache.sides import ROWS, SAMPLES, Side, batch_of

BY_NAME = {a.name: a for a in ARCHITECTURES}


BERT = BY_NAME["bert"]


EPOCH = [list(range(i, i + ROWS)) for i in range(0, SAMPLES, ROWS)]


def train(side: Side, batches: list[list[int]], start: int = 0) -> list[float]:
    losses = []
    for number, rows in enumerate(batches, start):
        losses.append(side.step(batch_of(side.architecture, rows), number)[0])
        side.optimizer.step()
    return losses


def pair(architecture: Architecture = BERT, depth: int = 2, **how: Any) -> tuple[Side, Side]:
    sides = Side(architecture, cached=True, **how), Side(architecture, cached=False)
    for side in sides:
        side.freeze(depth)
    return sides


def both(cached: Side, plain: Side, batches: list[list[int]], start: int = 0) -> None:
    assert train(cached, batches, start) == pytest.approx(train(plain, batches, start), rel=1e-5)


def on_disk(folder: Path, **changes: Any) -> CacheOptions:
    return CacheOptions(**{"mode": "disk", "memory": 0, "folder": folder, **changes})


def flush(side: Side) -> None:
    assert side.cache is not None
    disk = disk_of(side.cache.store)
    assert disk is not None
    disk.flush()


def hooks(side: Side) -> list[int]:
    """How many hooks and methods of its own each module has."""
    own = ("forward", "train")
    return [
        len(m._forward_pre_hooks) + len(m._forward_hooks) + sum(n in vars(m) for n in own) for m in side.model.modules()
    ]
