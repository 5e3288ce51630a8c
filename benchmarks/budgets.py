"""Which way of training is the fastest in each memory budget: frost line, cache, resting layers, compression, and more.

    python benchmarks/budgets.py bert --rows 16 --length 128 --threads 2   # writes results/budgets-bert-16x128.json

Random weights of base size. Every way (what trains x how activations are kept x micro-batches) in a process of its own:
the peak of a whole step, counted as memory.py does, and the time of a step against full fine-tuning, in turn with it. A
run that was stopped goes on after the last way. For each budget and each kind of training the fastest way that fits is
named (a compressed one only where it is 5 % faster than an exact one); what a kind changes in the model that comes out
is its own affair, and is measured elsewhere. Where boundary activations are cached, the records (``cached``: bytes a
sample) are not in the peak, since they may lie on disk, and the time is that of a step that finds all of them: not of
the first epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import arguments_of_shape, build_as, each_alone, finish, measure_memory, results_of, shape_of  # noqa: E402
from benchmarks.modes import MODES, Mode, Training  # noqa: E402
from benchmarks.reports import made_by  # noqa: E402
from benchmarks.timing import paired_ratio, seconds_per_call  # noqa: E402
from frostline.memory.planner import TELLS_APART  # noqa: E402

_ACTIVE = MODES["resting 0.9, moments of active layers"]
KINDS = (
    MODES["full"],
    MODES["LoRA r=8"],
    _ACTIVE,
    MODES["half frozen"],
    MODES["half frozen, cached"],
    replace(MODES["half frozen, cached"], name="half frozen, cached, resting 0.9", resting=_ACTIVE.resting,
            moments=_ACTIVE.moments),
)  # fmt: skip
PARTS = (1, 4)
GIB = 2**30
BUDGETS = tuple(size * GIB for size in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0))
WAYS: dict[str, tuple[str, Mode]] = {
    way.name: (kind.name, way)
    for kind in KINDS
    for kept in (kind, kind.checkpointed(), kind.compressed("slimfit"))
    for parts in PARTS
    for way in (replace(kept, name=f"{kept.name}, {parts} micro-batches" if parts > 1 else kept.name, parts=parts),)
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments_of_shape(parser, rows=16, modes=WAYS)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.mode:
        print(json.dumps(measure(options.mode, options)))
        return 0
    out = options.out or results_of("budgets", options)
    report = {**shape_of(options), **made_by("budgets.py", options.seed, options.device)}
    ways = each_alone(__file__, list(WAYS), report, options, out)
    finish({**report, "modes": ways, "best": best(ways)}, out)
    print(out)
    return 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of one way, and its time against full fine-tuning."""
    kind, way = WAYS[name]
    found, training = measure_memory(way, options)
    plain = build_as(MODES["full"], options)
    plain.settle(options.seed)
    samples = in_turn({"way": training, "full": plain}, options)
    cached = training.cache["bytes"] / training.cache["records"] if training.cache is not None else 0
    return {
        "kind": kind,
        "parts": way.parts,
        **found,
        "cached": cached,
        "time": paired_ratio(samples["way"], samples["full"], options.seed),
        "samples": samples,
    }


def in_turn(trainings: dict[str, Training], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step of each, one after the other in every round."""
    samples: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(options.rounds):
        order = list(trainings) if number % 2 else list(trainings)[::-1]
        for name in order:
            samples[name].append(seconds_per_call(trainings[name].step, 1, options.device))
    return samples


def best(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each budget, the fastest way of each kind that fits, an exact one if as fast; ``None`` where none does."""

    def slowness(way: dict[str, Any]) -> float:
        median: float = way["time"]["median"]
        return median if way["level"] != "off" else TELLS_APART * median

    rows = []
    for budget in BUDGETS:
        fits = [way for way in ways if way["peak"] <= budget]
        row: dict[str, Any] = {"budget": budget}
        for kind in KINDS:
            mine = [way for way in fits if way["kind"] == kind.name]
            fastest = min(mine, key=slowness, default=None)
            row[kind.name] = fastest and {"way": fastest["mode"], "time": fastest["time"]["median"]}
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
