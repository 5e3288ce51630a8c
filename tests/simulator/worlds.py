"""A model and a cluster whose numbers can be worked out by hand."""

from __future__ import annotations

from typing import Any

from frostline.simulator import Cluster, Course, Link, Move, Profile
from frostline.simulator.cluster import Blocks, Part

BLOCKS = 4


def profile(**changes: Any) -> Profile:
    """Four blocks of 1 s forward (2 s backward), 100 bytes of weights and 10 bytes of activations a sample.

    The stem and the head take no time; they have 40 and 20 bytes of weights, 5 and 2 of activations.
    """
    given: dict[str, Any] = {
        "stem": Part(forward_seconds=0.0, parameter_bytes=40, activation_bytes=5),
        "blocks": [Blocks(count=BLOCKS, forward_seconds=1.0, parameter_bytes=100, activation_bytes=10)],
        "head": Part(forward_seconds=0.0, parameter_bytes=20, activation_bytes=2),
    }
    return Profile(**{**given, **changes})


def cluster(**changes: Any) -> Cluster:
    """Ranks with 10,000 bytes each, joined by 100 bytes/s with a latency of 0.5 s; nothing overlaps or restarts."""
    given: dict[str, Any] = {
        "device_memory": 10_000,
        "between": Link(bytes_per_second=100.0, latency_seconds=0.5),
        "overlap": 0.0,
        "restart_seconds": 0.0,
        "price_per_rank_hour": 3600.0,  # so that a rank costs 1 a second
    }
    return Cluster(**{**given, **changes})


def course(*moves: tuple[int, int], samples: int = 100, epochs: float = 2.0) -> Course:
    """``moves`` are (samples, depth)."""
    return Course(tuple(Move(samples=at, depth=depth) for at, depth in moves), samples, epochs)
