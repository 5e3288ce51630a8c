"""Whether ranks agree, what they send and how long they take: a Hugging Face Trainer as it is, under torchrun.

    frostline fetch minilm trec
    python benchmarks/distributed.py                  # all parts, into benchmarks/results/distributed.json
    python benchmarks/distributed.py --part bytes     # one of them; the others stay in the file as they are

The recipe's model, data and learning rate, without dropout and without a cache; steps of 16 samples in the same order
on any number of ranks (1 x 16, 2 x 8, 4 x 4), gloo, a thread each.

agreement  Policies gradient-norm and ramp on 1, 2 and 4 ranks. Whether all ranks took the same decisions, by the same
           numbers, and have the same weights at the end, bit for bit; whether the line moved as on one rank; and
           CPU-seconds of training, all ranks together. Before every tenth step the first rank computes the loss of all
           ranks' samples with the weights that the step begins with, as one rank alone would have it (teacher-forced).
           Target: the mean of the ranks' losses is within 1e-5 of it. How far the losses of whole runs are apart is
           reported.
bytes      Bytes that DDP hands out at a step, counted in a communication hook, at each depth, on 2 and 4 ranks, with
           the Trainer's own choice of ddp_find_unused_parameters and without. Target: within 2 % of the gradients of
           what trains.
time       Seconds a step on 1 and 2 ranks, all blocks training and half of them frozen, in rounds: the order of both
           is drawn anew each time, and ratios are taken within a round. Four ranks would share the cores of a small
           machine, so they are not timed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rank_runs import BATCH, Case  # noqa: E402
from benchmarks.ranks import launch  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from benchmarks.timing import paired_ratio, spread  # noqa: E402
from frostline import FrostlineError  # noqa: E402
from frostline.recipes.directory import write_recipe  # noqa: E402
from frostline.recipes.schema import Recipe, load_recipe  # noqa: E402

TOLERANCE = 1e-5
PROPORTION = 0.02
POLICIES: dict[str, dict[str, Any]] = {
    "gradient-norm": {"policy": "gradient-norm", "percentile": 75.0, "evaluations_per_epoch": 10},
    "ramp": {"policy": "ramp", "start": 0.0, "level": 1.0, "evaluations_per_epoch": 12},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "the Trainer's own": {},
    "ddp_find_unused_parameters=False": {"ddp_find_unused_parameters": False},
}
SIDES: dict[str, dict[str, Any]] = {
    "full": {"policy": "none"},
    "half frozen": {"policy": "static", "fraction": 0.5},
}
_CHECKED_EVERY = 10
_BYTES_STEPS = 24
# In a timed run; the first ones warm up.
_TIMED_STEPS, _WARM_UP = 24, 4
# Seconds for one launch.
_PATIENCE = 900.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    torch.set_num_threads(1)  # as in the ranks: the results say so
    try:
        recipe = load_recipe(options.recipe, [*options.overrides, f"seed={options.seed}"])
    except FrostlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {"recipe": options.recipe, "overrides": options.overrides, "seed": options.seed}
    earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    report = earlier if earlier.get("settings") == settings else {"settings": settings, "batch": BATCH, "parts": {}}
    for part in options.part or PARTS:
        about = made_by("distributed.py", options.seed, "cpu")
        report["parts"][part] = {**about, **PARTS[part](recipe, options)}
        write(report, options.out)
    print(options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="trec", help="a shipped recipe or a YAML file (default trec)")
    parser.add_argument("overrides", nargs="*", help="dotted overrides of the recipe")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be given again")
    parser.add_argument("--steps", type=int, default=120, help="steps of a run of part agreement (default 120)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of part time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of samples, rounds and bootstrap")
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json", help="results file")
    return parser


def run(recipe: Recipe, cases: dict[str, Case], ranks: int) -> list[dict[str, Any]]:
    """What each of ``ranks`` saw of ``cases``, as ``rank_runs.run`` says it, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(recipe, folder)
        (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        return launch("benchmarks.rank_runs", folder, ranks=ranks, seconds=_PATIENCE)


# -- agreement --------------------------------------------------------------------------------------------


def agreement_cases(steps: int) -> dict[str, Case]:
    """Both policies, every step's loss told."""
    return {
        name: Case(
            frost=frost, steps=steps, arguments={"logging_steps": 1}, counted=True, checked_every=_CHECKED_EVERY
        )
        for name, frost in POLICIES.items()
    }  # fmt: skip


def agreement(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Each policy on 1, 2 and 4 ranks."""
    cases = agreement_cases(options.steps)
    found = {ranks: run(recipe, cases, ranks) for ranks in tqdm((1, 2, 4), desc="agreement", unit="launch")}
    return {"steps": options.steps, "runs": compare(found)}


def compare(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ranks with each other and with one rank alone; ``found`` is what :func:`run` gives by number of ranks."""
    rows = []
    for policy in found[1][0]:
        (alone,) = (rank[policy] for rank in found[1])
        for ranks, seen in found.items():
            runs = [rank[policy] for rank in seen]
            first = runs[0]
            forced = max(_apart(first["losses"][int(step)], loss) for step, loss in first["whole"].items())
            rows.append(
                {
                    "policy": policy,
                    "ranks": ranks,
                    "decisions": first["decisions"],
                    "moves": first["moves"],
                    "weights": [one["weights"] for one in runs],
                    "losses": first["losses"],
                    "limits": first["limits"],
                    "cpu_seconds": [one["cpu_seconds"] for one in runs],
                    "same_decisions": all(one["decisions"] == first["decisions"] for one in runs),
                    "same_weights": len({one["weights"] for one in runs}) == 1,
                    "moves_of_one_rank": first["moves"] == alone["moves"],
                    "teacher_forced": forced,
                    "target": TOLERANCE,
                    "met": forced <= TOLERANCE,
                    "free_running": max(map(_apart, first["losses"], alone["losses"])),
                }
            )
    return rows


def _apart(one: float, other: float) -> float:
    return abs(one - other) / abs(other)


# -- bytes ------------------------------------------------------------------------------------------------


def traffic(recipe: Recipe, _: argparse.Namespace) -> dict[str, Any]:
    """A ramp through all depths on 2 and 4 ranks."""
    frost = {**POLICIES["ramp"], "evaluations_per_epoch": _BYTES_STEPS}
    cases = {
        name: Case(frost=frost, steps=_BYTES_STEPS, arguments=arguments, counted=True, checked_every=0)
        for name, arguments in ARGUMENTS.items()
    }
    rows = []
    for ranks in tqdm((2, 4), desc="bytes", unit="launch"):
        seen = run(recipe, cases, ranks)
        for name in cases:
            steps = [step for rank in seen for step in rank[name]["steps"]]
            rows.append({"arguments": name, "ranks": ranks, "depths": by_depth(steps)})
    return {"steps": _BYTES_STEPS, "runs": rows}


def by_depth(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each depth: bytes of the gradients of what trains, the least and the most sent, and how far they are apart."""
    rows = []
    for depth in sorted({step["depth"] for step in steps}):
        here = [step for step in steps if step["depth"] == depth]
        apart = max(_apart(step["sent"], step["active"]) for step in here)
        rows.append(
            {
                "depth": depth,
                "active": here[0]["active"],
                "sent": [min(step["sent"] for step in here), max(step["sent"] for step in here)],
                "apart": apart,
                "target": PROPORTION,
                "met": apart <= PROPORTION,
            }
        )
    return rows


# -- time -------------------------------------------------------------------------------------------------


def timed_cases() -> dict[str, Case]:
    """Both sides, with nothing in the run that a user would not have."""
    return {
        name: Case(
            frost=frost, steps=_TIMED_STEPS, arguments={"logging_strategy": "no"}, counted=False, checked_every=0
        )
        for name, frost in SIDES.items()
    }  # fmt: skip


def step_times(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """A launch on 1 and one on 2 ranks in each round, with both sides in it."""
    order, cases = random.Random(options.seed), timed_cases()
    samples: dict[int, dict[str, list[float]]] = {ranks: {side: [] for side in cases} for ranks in (1, 2)}
    for _ in tqdm(range(options.rounds), desc="time", unit="round"):
        for ranks in order.sample(list(samples), len(samples)):
            drawn = {side: cases[side] for side in order.sample(list(cases), len(cases))}
            add_medians(samples[ranks], run(recipe, drawn, ranks)[0])
    return {"steps": _TIMED_STEPS, "rounds": options.rounds, **ratios(samples, options.seed)}


def add_medians(samples: dict[str, list[float]], seen: dict[str, Any]) -> None:
    """Add the median of each side's steps, as one rank saw them, without those that warm up; seconds."""
    for side, found in seen.items():
        samples[side].append(median(step["seconds"] for step in found["steps"][_WARM_UP:]))


def ratios(samples: dict[int, dict[str, list[float]]], seed: int) -> dict[str, Any]:
    """How much faster a step gets by freezing and by a second rank; ``samples`` are seconds by ranks and side."""
    return {
        "runs": [
            {
                "ranks": ranks,
                "frozen_speedup": paired_ratio(sides["full"], sides["half frozen"], seed),
                "seconds": {side: spread(values) for side, values in sides.items()},
                "samples": sides,
            }
            for ranks, sides in samples.items()
        ],
        "second_rank_speedup": {side: paired_ratio(samples[1][side], samples[2][side], seed) for side in samples[1]},
    }


PARTS: dict[str, Callable[[Recipe, argparse.Namespace], dict[str, Any]]] = {
    "agreement": agreement,
    "bytes": traffic,
    "time": step_times,
}


if __name__ == "__main__":
    sys.exit(main())
