"""Carrying a Trainer's checkpoint over to a stage whose steps are others.

The Trainer finds its place in the data and in its schedule by counting optimizer steps. A checkpoint that goes on with
another batch is therefore written again in steps of the next stage: its place in the epoch, the schedule, the learning
rate. Everything else (weights, moments, random states, Frostline's own state, which counts samples) stays as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from frostline.packing.order import Order
from frostline.packing.stages import Stage

__all__ = ["carry"]


def carry(checkpoint: Path, checkpoints: Path, now: Stage, following: Stage, before: Order, after: Order) -> Path:
    """Make the first checkpoint of stage ``following`` of the last one of stage ``now``; doing so twice is no harm.

    Args:
        checkpoint: where the Trainer of ``now`` stopped.
        checkpoints: the folder of the run's checkpoints.
        before: the order of samples in ``now``.
        after: in ``following``.

    Returns:
        Where it is.
    """
    folder = following.checkpoints(checkpoints)
    target, temporary = folder / f"checkpoint-{after.begins_at}", folder / "carried.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint, temporary)
    longer = after.steps / before.steps
    with _json(temporary / "trainer_state.json") as state:
        state.update(
            global_step=after.begins_at,
            max_steps=round(state["max_steps"] * longer),
            train_batch_size=following.rows,
        )
        for name in ("logging_steps", "eval_steps", "save_steps"):
            # Constant in samples; below 1 they are shares of the run, which the Trainer has resolved already.
            if state.get(name):
                state[name] = max(1, round(state[name] * longer))
    rate = following.rate / now.rate
    if (longer, rate) != (1, 1):
        _rewrite(temporary / "scheduler.pt", lambda schedule: _reschedule(schedule, after.begins_at, rate))
        _rewrite(temporary / "optimizer.pt", lambda optimizer: _scale(optimizer, rate))
    # Transformers names the random state of a rank that is alone otherwise.
    alone, first = temporary / "rng_state.pth", temporary / "rng_state_0.pth"
    if following.ranks == 1 and first.is_file():
        os.replace(first, alone)
    elif following.ranks > 1 and alone.is_file():
        os.replace(alone, first)
    os.replace(temporary, target)
    return target


class _json:
    """The content of a JSON file, written back at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> dict[str, Any]:
        self._content = dict[str, Any](json.loads(self._path.read_text(encoding="utf-8")))
        return self._content

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._path.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")


def _rewrite(path: Path, change: Any) -> None:
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True)
        change(content)
        torch.save(content, path)


def _reschedule(schedule: dict[str, Any], step: int, rate: float) -> None:
    schedule["last_epoch"] = step  # torch calls what a scheduler counts an epoch
    schedule["_step_count"] = step + 1
    for name in ("base_lrs", "_last_lr"):
        schedule[name] = [rate * value for value in schedule[name]]


def _scale(optimizer: dict[str, Any], rate: float) -> None:
    for group in optimizer["param_groups"]:
        for name in {"lr", "initial_lr"} & group.keys():
            group[name] = rate * group[name]
