"""Does reading a record pay? Measured on the running job, not assumed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Cost"]

# Whole batches that are timed for each side; on a GPU each of them waits for the device.
_BATCHES = 8


class Cost:
    """Seconds a sample of reading records at the frost line, and of computing what they hold from the start."""

    def __init__(self) -> None:
        self._reading: list[float] = []
        self._computing: list[float] = []
        self._told = False

    def moved(self) -> None:
        """The line is deeper: reading is measured anew; computing takes at least as long as it did."""
        self._reading, self._told = [], False

    @contextmanager
    def reading(self, rows: int, before: float) -> Iterator[None]:
        """Time how a whole batch is joined; ``before`` are the seconds that looking its records up has taken."""
        if len(self._reading) >= _BATCHES:
            yield
            return
        started = _now()
        yield
        self._reading.append((before + _now() - started) / rows)

    @contextmanager
    def computing(self, rows: int) -> Iterator[None]:
        """Time how a whole batch is computed from the start."""
        if len(self._computing) >= _BATCHES:
            yield
            return
        started = _now()
        yield
        self._computing.append((_now() - started) / rows)

    def numbers(self) -> dict[str, float] | None:
        """Once at each depth, when both sides are known: medians of ``reading`` and ``computing``, seconds a sample."""
        if self._told or len(self._reading) < _BATCHES or not self._computing:
            return None
        self._told = True
        return {"reading": statistics.median(self._reading), "computing": statistics.median(self._computing)}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
