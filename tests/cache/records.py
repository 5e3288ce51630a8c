"""Records that can be told apart by their numbers, for the tests of the stores."""

from __future__ import annotations

from pathlib import Path

import torch

from frostline.cache.disk import DiskStore
from frostline.cache.slotstore import SlotStore

WIDTH = 24


def prefix(depth: int) -> bytes:
    return bytes([depth]) * 16


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def value(number: int, depth: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * depth + number)
    return torch.randn(3 + number % 5, WIDTH, generator=generator)


def filled(folder: Path, count: int = 20, depth: int = 1, *, keep: bool = False) -> DiskStore:
    store = DiskStore(folder, 1 << 20, prefix=prefix, keep=keep)
    for number in range(count):
        assert store.put(key(number), depth, value(number, depth))
    store.flush()
    return store


def assert_records(store: SlotStore, count: int, depth: int) -> None:
    for number, record in enumerate(store.get_many([key(n) for n in range(count)])):
        assert record is not None
        assert record.depth == depth
        assert torch.equal(record.value, value(number, depth))
