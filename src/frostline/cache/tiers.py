"""Several tiers used as one store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frostline.cache.disk import DiskStore
from frostline.cache.store import Record, Store

__all__ = ["Tiers", "disk_of", "tiers_of"]


class Tiers:
    """Several stores as one, the fastest first: a record goes to the first tier that has room for it and stays there.

    It is upgraded where it is, because its space there is its own.
    """

    def __init__(self, *tiers: Store) -> None:
        self.tiers = tiers

    @property
    def device(self) -> torch.device:
        return self.tiers[0].device

    @property
    def records(self) -> int:
        return sum(tier.records for tier in self.tiers)

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self.tiers)

    @property
    def torn(self) -> int:
        return sum(tier.torn for tier in self.tiers)

    @property
    def lost(self) -> int:
        return sum(tier.lost for tier in self.tiers)

    @property
    def skipped(self) -> int:
        return sum(tier.skipped for tier in self.tiers)

    @property
    def failure(self) -> str | None:
        return next((tier.failure for tier in self.tiers if tier.failure is not None), None)

    def holds(self, key: bytes) -> bool:
        return any(tier.holds(key) for tier in self.tiers)

    @property
    def reads_ahead(self) -> bool:
        return any(tier.reads_ahead and tier.records for tier in self.tiers)

    def expect(self, keys: Sequence[bytes]) -> None:
        for tier in self.tiers:
            tier.expect(keys)
            keys = [key for key in keys if not tier.holds(key)]

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        records: list[Record | None] = [None] * len(keys)
        for tier in self.tiers:
            missing = [place for place, record in enumerate(records) if record is None]
            for place, record in zip(missing, tier.get_many([keys[place] for place in missing]), strict=True):
                records[place] = record
        return records

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        holder = next((tier for tier in self.tiers if tier.holds(key)), None)
        if holder is not None and holder.put(key, depth, value.to(holder.device)):
            return True
        for tier in self.tiers:
            if tier is not holder and tier.put(key, depth, value.to(tier.device)):
                if holder is not None:  # what it still has would hide the deeper record
                    holder.drop(key)
                return True
        return False

    def drop(self, key: bytes) -> None:
        for tier in self.tiers:
            tier.drop(key)

    def depths(self) -> set[int]:
        return set().union(*(tier.depths() for tier in self.tiers))

    def moved(self, depth: int) -> int:
        return sum(tier.moved(depth) for tier in self.tiers)

    def cool(self) -> None:
        for tier in self.tiers:
            tier.cool()

    def clear(self) -> None:
        for tier in self.tiers:
            tier.clear()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()


def tiers_of(store: Store) -> tuple[Store, ...]:
    """The tiers of a store, the fastest first."""
    return store.tiers if isinstance(store, Tiers) else (store,)


def disk_of(store: Store) -> DiskStore | None:
    """The disk among the tiers of a store, if there is one."""
    return next((tier for tier in tiers_of(store) if isinstance(tier, DiskStore)), None)
