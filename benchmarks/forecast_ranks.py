"""What each process of ``benchmarks/forecast.py`` runs: Trainers of a recipe, one after the other, and their link.

Started under ``torchrun`` it runs every way in ``FOLDER/ways.json`` and writes ``FOLDER/rank<n>.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from frostline.adapters.huggingface import attach
from frostline.adapters.recorder import Recorder
from frostline.events import TRAINING_PHASES, EventLog
from frostline.recipes.runner import build_trainer, prepare
from frostline.recipes.schema import load_recipe

__all__ = ["measured_link", "train"]

_BYTES, _TIMES = 64 * 2**20, 9


def train(name: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train as a recipe says, in this process or as one of several ranks, without its evaluations and its model.

    Returns:
        Seconds of training as a run's summary has them, steps, and what the cache did.
    """
    recipe = load_recipe(name, overrides)
    freeze = recipe.freeze
    recorder = Recorder(EventLog(), title=f"depth {freeze.options['depth']}, cache {recipe.cache.mode}", plain=False)
    trainer = build_trainer(recipe, prepare(recipe), folder)
    trainer.add_callback(recorder)
    frost = attach(trainer, freeze.policy, recipe.cache, events=recorder.log, **freeze.options)
    recorder.watch(frost)
    trainer.train()
    seconds = recorder.finish()
    summary = frost.summary()
    return {
        "seconds": sum(seconds[phase] for phase in TRAINING_PHASES),
        "steps": recorder.steps,
        "hits": summary["cache"]["hits"] if summary["cache"] else 0,
        "limits": summary["limits"],
    }


def measured_link() -> dict[str, float]:
    """Bandwidth and latency of the ring that two ranks make, from all-reduces of one number and of many."""
    few, many = (_all_reduce_seconds(size) for size in (1, _BYTES // 4))
    # Of two ranks each sends two messages, each of half of the bytes.
    return {"bytes_per_second": _BYTES / (many - few), "latency_seconds": few / 2}


def _all_reduce_seconds(size: int) -> float:
    values, found = torch.ones(size), []
    for _ in range(_TIMES + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        found.append(time.perf_counter() - start)
        values.fill_(1.0)
    return statistics.median(found[1:])


def main(folder: Path) -> None:
    """Run every way, and measure the link that they have used."""
    torch.set_num_threads(1)
    given = json.loads((folder / "ways.json").read_text(encoding="utf-8"))
    rank = os.environ["RANK"]
    runs = [train(given["recipe"], way, folder / f"checkpoints{rank}") for way in given["ways"]]
    found = {"link": measured_link(), "runs": runs}
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
