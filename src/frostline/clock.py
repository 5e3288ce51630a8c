"""Where a run stands: optimizer steps, samples, epochs; and when its process began."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from frostline.errors import ConfigError

__all__ = ["Clock", "process_start"]


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
        self.step = 0
        self._since = (0, 0)

    @property
    def samples(self) -> int:
        """How many have been trained on; every epoch has the same number, and ends with what is left of it."""
        begun, samples = self._since
        steps, left = self.step - begun, self.samples_per_epoch - samples % self.samples_per_epoch
        first = math.ceil(left / self.batch_size)  # steps in what is left of the epoch in which counting began
        if steps < first:
            return samples + steps * self.batch_size
        epochs, within = divmod(steps - first, self.steps_per_epoch)
        return samples + left + epochs * self.samples_per_epoch + min(within * self.batch_size, self.samples_per_epoch)

    def resume(self, step: int, samples: int) -> None:
        """Go on from a saved run, which may have counted other batches."""
        self.step, self._since = step, (step, samples)

    @property
    def epochs_left(self) -> float:
        """How many more epochs bring back a sample that comes by now; in a stream it may come at any time."""
        if not self.sized:
            return math.inf
        return max(0, math.ceil(self.epochs - 1e-6) - 1 - self.samples // self.samples_per_epoch)


def process_start() -> float:
    """When this process started, in seconds since the epoch; where the system does not say, when this is called."""
    now = time.time()
    try:
        # Field 22 of /proc/self/stat, counted after the name (which may hold spaces), in clock ticks since boot.
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - max(0.0, age)
