"""Where a run stands: optimizer steps, samples, epochs."""

from __future__ import annotations

import math

from frostline.errors import ConfigError

__all__ = ["Clock"]


class Clock:
    """Counts the optimizer steps of a run; the rest follows from them.

    Args:
        steps_per_epoch: optimizer steps in an epoch.
        epochs: in the run (may be fractional).
        batch_size: samples per optimizer step over all ranks and micro-batches.
        samples_per_epoch: where the last batch of an epoch is smaller.
        sized: whether ``steps_per_epoch`` is an epoch; a stream has none.

    Attributes:
        step: how many have been done.

    Raises:
        ConfigError: a value that is not above 0.
    """

    def __init__(
        self, steps_per_epoch: int, epochs: float, batch_size: int = 1, samples_per_epoch: int | None = None,
        *, sized: bool = True,
    ) -> None:  # fmt: skip
        for name, value in (("steps_per_epoch", steps_per_epoch), ("epochs", epochs), ("batch_size", batch_size)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: must be greater than 0")
        self.steps_per_epoch, self.epochs, self.batch_size, self.sized = steps_per_epoch, epochs, batch_size, sized
        full = steps_per_epoch * batch_size
        self.samples_per_epoch = min(samples_per_epoch or full, full)
        self.step = self._before = 0

    @property
    def samples(self) -> int:
        """How many have been trained on; every epoch has the same number."""
        epochs, within = divmod(self.step, self.steps_per_epoch)
        here = epochs * self.samples_per_epoch + min(within * self.batch_size, self.samples_per_epoch)
        return self._before + here

    def resume(self, step: int, samples: int) -> None:
        """Go on from a saved run, which may have counted other batches."""
        self.step, self._before = step, 0
        self._before = samples - self.samples

    @property
    def epochs_left(self) -> float:
        """How many more epochs bring back a sample that comes by now; in a stream it may come at any time."""
        if not self.sized:
            return math.inf
        return max(0, math.ceil(self.epochs - 1e-6) - 1 - self.samples // self.samples_per_epoch)
