"""The frost line over a run, as a simulation takes it: moves, and the stretches of samples between them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from pydantic import Field, model_validator

from frostline.errors import ConfigError
from frostline.simulator.cluster import Input

__all__ = ["Course", "Move", "Stretch", "Trajectory"]


class Move(Input):
    """From ``samples`` seen on, ``depth`` blocks are frozen. ``step``, which runs write too, is not used."""

    samples: int = Field(ge=0)
    depth: int = Field(ge=0)
    step: int | None = None


class Trajectory(Input):
    """A trajectory's file. Until the first move the depth is 0; of two moves at one sample the later holds."""

    moves: tuple[Move, ...]
    samples_per_epoch: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> Trajectory:
        for before, after in itertools.pairwise(self.moves):
            if after.samples < before.samples:
                raise ValueError(f"moves: samples={after.samples} comes after {before.samples}: they must increase")
        return self

    def course(self, samples_per_epoch: int | None = None, epochs: float | None = None) -> Course:
        """The run to simulate; what is not given is what the file says.

        Raises:
            ConfigError: neither says how many samples or epochs.
        """
        samples = self.samples_per_epoch if samples_per_epoch is None else samples_per_epoch
        length = self.epochs if epochs is None else epochs
        if samples is None or length is None:
            options = (
                ("--samples (or samples_per_epoch in the file)", samples),
                ("--epochs (or epochs there)", length),
            )
            missing = " and ".join(option for option, value in options if value is None)
            raise ConfigError(f"the trajectory does not say how long the run is: give {missing}")
        if samples < 1 or not 0 < length < math.inf:
            raise ConfigError(f"samples={samples}, epochs={length:g}: both must be above 0")
        return Course(self.moves, samples, length)


@dataclass(frozen=True)
class Stretch:
    """``samples`` samples of one epoch (from 0) that are trained on at one depth; ``start`` were seen before."""

    start: int
    samples: int
    depth: int
    epoch: int


@dataclass(frozen=True)
class Course:
    """A trajectory over a run of ``epochs`` epochs. Moves after its end are never made."""

    moves: tuple[Move, ...]
    samples_per_epoch: int
    epochs: float

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return max(1, round(self.samples_per_epoch * self.epochs))

    @property
    def late(self) -> tuple[Move, ...]:
        """The moves that are never made."""
        return tuple(move for move in self.moves if move.samples >= self.samples)

    def unfrozen(self) -> Course:
        """The same run with nothing frozen."""
        return replace(self, moves=())

    def depth_at(self, samples: int) -> int:
        """The depth for the next sample, once ``samples`` have been seen."""
        return next((move.depth for move in reversed(self.moves) if move.samples <= samples), 0)

    def stretches(self) -> list[Stretch]:
        """The run cut at every move and at every epoch's end; together they hold each sample once."""
        cuts = {0, self.samples, *range(0, self.samples, self.samples_per_epoch)}
        cuts |= {move.samples for move in self.moves if move.samples < self.samples}
        return [
            Stretch(start, end - start, self.depth_at(start), start // self.samples_per_epoch)
            for start, end in itertools.pairwise(sorted(cuts))
        ]
