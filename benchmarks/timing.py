"""Reading the clock, and what may be concluded from the readings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["now", "paired_ratio", "seconds_per_call", "spread"]

_RESAMPLES = 10_000


def now(device: str) -> float:
    """Seconds, once ``device`` has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_per_call(call: Callable[[], object], times: int, device: str) -> float:
    """Mean seconds of ``times`` calls in a row, without the garbage collector (which strikes at random)."""
    gc.disable()
    try:
        start = now(device)
        for _ in range(times):
            call()
        return (now(device) - start) / times
    finally:
        gc.enable()


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median and the quartiles around it."""
    low, middle, high = (float(q) for q in np.percentile(samples, [25, 50, 75]))
    return {"median": middle, "iqr": [low, high], "samples": len(samples)}


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> dict[str, Any]:
    """Median of the ratios of pairs taken side by side, with its 95 % bootstrap interval (percentile method).

    The ratio of a pair cancels what slowed both down; the ratio of two medians would not.
    """
    ratios = np.asarray(numerators) / np.asarray(denominators)
    draws = np.random.default_rng(seed).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = (float(q) for q in np.percentile(np.median(draws, axis=1), [2.5, 97.5]))
    return {"median": float(np.median(ratios)), "interval": [low, high], "pairs": len(ratios)}
