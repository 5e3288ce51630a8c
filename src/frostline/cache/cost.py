"""Does keeping and reading a record pay? Measured on the running job, not assumed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from frostline.cache.store import Record, Store

__all__ = ["Cost", "Price", "price_of", "seconds_of"]

# Whole batches that are timed for each side; on a GPU each of them waits for the device.
_BATCHES = 8
_TRIALS = 3


class Price(NamedTuple):
    """What one sample costs at the frost line, in seconds and bytes, before anything has been kept.

    ``computing``: from the model's input; ``writing`` and ``reading``: of a tier; ``nbytes``: of its record.
    """

    computing: float
    writing: float
    reading: float
    nbytes: float

    def pays(self, visits: float) -> bool:
        """Whether a record that will be read ``visits`` times is worth making."""
        return visits * (self.computing - self.reading) > self.writing


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


def seconds_of(job: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of the fastest of three calls (whatever else the machine does makes a call slower, never faster).

    ``before`` each of them something may be put back in order; that is not timed.
    """
    found = []
    for _ in range(_TRIALS):
        before()
        started = _now()
        job()
        found.append(_now() - started)
    return min(found)


def price_of(
    rows: int,
    store: Store,
    *,
    compute: Callable[[], Any],
    write: Callable[[], Any],
    find: Callable[[], list[Record | None]],
    join: Callable[[list[Record | None]], Any],
) -> Price:
    """Time computing, writing and reading of a batch of ``rows``; from disk with nothing of it in the page cache."""
    computing, writing = seconds_of(compute) / rows, seconds_of(write) / rows
    store.cool()
    if None in find():  # no room for a single batch
        return Price(computing, writing, math.inf, 0.0)
    reading = seconds_of(lambda: join(find()), store.cool) / rows
    return Price(computing, writing, reading, store.nbytes / rows)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
