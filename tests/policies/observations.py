"""Plans and observations for policies: numbers only, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frostline.policies import Decision, Explained, Observation, Plan, Policy, create


def plan(blocks: int = 4, *, per_step: int = 8, per_epoch: int = 80, epochs: float = 2.0) -> Plan:
    """``blocks`` blocks, a stem and a head; ten steps an epoch."""
    return Plan(
        block_paths=tuple(f"body.{i}" for i in range(blocks)),
        stem_paths=("stem",),
        head_paths=("head",),
        samples_per_step=per_step,
        samples_per_epoch=per_epoch,
        epochs=epochs,
        layer_paths=tuple(f"body.{i}.weight" for i in range(blocks)),
        bias_paths=tuple(f"body.{i}.bias" for i in range(blocks)),
    )


def seen(scores: Sequence[float] | None, *, depth: int = 0, blocks: int = 4, progress: float = 0.5,
         interval: int = 2, step: int = 10) -> Observation:  # fmt: skip
    """An observation; ``scores`` are those of the active blocks, ``depth`` and up."""
    return Observation(
        step=step,
        samples=step * 8,
        progress=progress,
        depth=depth,
        blocks=blocks,
        scores=None if scores is None else {depth + i: float(s) for i, s in enumerate(scores)},
        interval_steps=interval,
    )


def walk(policy: Policy[Any], steps: Sequence[Sequence[float]], blocks: int = 4) -> list[tuple[Decision, Explained]]:
    """Ask ``policy`` once per entry, following its own decisions; entries hold a score for every block."""
    found: list[tuple[Decision, Explained]] = []
    depth = 0
    for scores in steps:
        found.append(policy.decide(seen(scores[depth:], depth=depth, blocks=blocks)))
        depth = found[-1][0].depth
    return found


def build(name: str, blocks: int = 4, **options: Any) -> Policy[Any]:
    """A policy for :func:`plan`."""
    return create(name, options, plan(blocks))
