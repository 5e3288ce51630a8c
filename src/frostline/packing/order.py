"""Which samples a rank trains on, and when: the same order under any number of ranks and any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from frostline.packing.stages import Stage

__all__ = ["Order"]


class Order(Sampler[list[int]]):
    """Micro-batches of one rank, as lists of row numbers.

    An epoch's order depends on the seed and the epoch alone. Its batches are whole numbers of ``unit`` samples, the
    batch of the run's first stage, so that they can be dealt out evenly to the ranks of any stage; what an epoch has
    beyond a whole number of units is left out (other samples in each epoch). A stage that begins inside an epoch takes
    the rest of it: the first micro-batches of that epoch are then empty, and are to be skipped, as those are that a
    checkpoint has behind it.

    Args:
        rows: of the data.
        unit: samples in a batch of the run's first stage.
        stage: the one at work.
        rank: of this process.
        seed: of the order.
        shuffled: whether the order is drawn anew for each epoch.
        parts: the data are divided into so many, by the seed, and a batch takes as much of each; the ranks of one host
            come one after the other, so with a part for each host a sample comes to the same host in every epoch.

    Attributes:
        samples: in an epoch.
        steps: in an epoch that is trained from its start.
        batch_size, drop_last: what torch and Accelerate ask of a sampler of batches.
    """

    def __init__(
        self, rows: int, unit: int, stage: Stage, *, rank: int, seed: int, shuffled: bool = True, parts: int = 1
    ) -> None:
        assert unit % (stage.ranks * stage.accumulation) == 0, "a batch of the first stage is dealt out evenly"
        self._rows, self._stage, self._rank = rows, stage, rank
        self._seed, self._shuffled, self._parts = seed, shuffled, parts
        # Each part gives as much to every unit, so the smallest one says how many there are.
        self.samples = rows // parts // (unit // parts) * unit
        self.steps = math.ceil(self.samples / stage.batch)
        self.batch_size, self.drop_last = stage.rows, False
        self._epoch = 0

    @property
    def begins_at(self) -> int:
        """The optimizer step at which the stage begins, as its Trainer counts them: in steps of this stage."""
        epoch, behind = divmod(self._stage.samples, self.samples)
        return (epoch + 1) * self.steps - math.ceil((self.samples - behind) / self._stage.batch)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.steps * self._stage.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        stage, (first, behind) = self._stage, divmod(self._stage.samples, self.samples)
        begin = behind if self._epoch == first else 0
        remaining = math.ceil((self.samples - begin) / stage.batch)
        for _ in range((self.steps - remaining) * stage.accumulation):
            yield []
        orders = self._orders()
        for start in range(begin, self.samples, stage.batch):
            end = min(start + stage.batch, self.samples)
            batch = [row for order in orders for row in order[start // self._parts : end // self._parts]]
            rows = len(batch) // (stage.ranks * stage.accumulation)
            own = self._rank * stage.accumulation * rows
            for micro in range(own, own + stage.accumulation * rows, rows):
                yield batch[micro : micro + rows]

    def _orders(self) -> list[list[int]]:
        """Of each part, the rows in the order of this epoch."""
        rows = self._drawn(self._rows, 0) if self._shuffled and self._parts > 1 else list(range(self._rows))
        parts = [rows[part :: self._parts] for part in range(self._parts)]
        if not self._shuffled:
            return parts
        return [[part[i] for i in self._drawn(len(part), 1 + self._epoch)] for part in parts]

    def _drawn(self, count: int, what: int) -> list[int]:
        # One number of both, so that neighbouring seeds have nothing in common.
        generator = torch.Generator().manual_seed((self._seed << 20) + what)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order
