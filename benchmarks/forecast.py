"""What ``frostline plan`` says of training time, against real runs: one process, and two that train together.

    frostline fetch minilm trec
    python benchmarks/forecast.py     # writes benchmarks/results/forecast.json

The recipe (trec-demo, shortened to 200 steps of one process) is predicted and then run with policy ``static`` at
several depths, with and without the cache in host memory, one thread to a process. Two processes are joined by gloo,
under a Trainer. Their profile is measured in two processes at once, because they share the machine's memory, and
their link by all-reduces; no overlap is counted, because what sends takes the cores that compute. Nothing is fitted to
a run. Measured is training time as a run's summary has it: waiting for data and the cache's checks and writes are
in it. Target: within 15 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.abreast import abreast  # noqa: E402
from benchmarks.forecast_ranks import train  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from frostline.planning import ALONE, forecast  # noqa: E402
from frostline.recipes.schema import load_recipe  # noqa: E402
from frostline.simulator import Cluster, Course, Link, Move, Profile, simulate  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.15
SHORT = ("data.train_limit=800",)
# Training time alone is predicted. Left to itself the Trainer lets DDP search the graph at each step, and does not see
# the process group of the Trainer before it.
ALWAYS = (
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "training.ddp_find_unused_parameters=false",
    "training.use_cpu=true",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="trec-demo", help="a shipped recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", help=f"dotted overrides of the recipe (default {' '.join(SHORT)})")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 2, 5], help="default 0 2 5")
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="default 1 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "forecast.json")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    settings = [*(options.overrides or SHORT), *ALWAYS, f"seed={options.seed}", "threads=1"]
    ways = [(depth, cache) for depth in options.depths for cache in ("off", "memory") if depth or cache == "off"]
    report = {
        "recipe": options.recipe,
        "settings": settings,
        **made_by("forecast.py", options.seed, "cpu"),
        "target": TARGET,
        "sides": [compare(options.recipe, settings, ways, ranks) for ranks in options.ranks],
    }
    report["met"] = all(abs(run["error"]) <= TARGET for side in report["sides"] for run in side["runs"])
    write(report, options.out)
    print(options.out)
    return 0


def compare(recipe: str, settings: list[str], ways: list[tuple[int, str]], ranks: int) -> dict[str, Any]:
    """Predict every way, a depth and a mode of the cache, then run it."""
    found = _profile(recipe, settings, ranks)
    each = [[*settings, f"freeze={{policy: static, depth: {depth}}}", f"cache.mode={mode}"] for depth, mode in ways]
    ran = _run(recipe, each, ranks)
    cluster = ALONE
    if ran["link"] is not None:
        cluster = Cluster(device_memory=ALONE.device_memory, between=Link(**ran["link"]), overlap=0.0)
    profile = Profile.model_validate(found["profile"])
    runs = []
    for (depth, mode), run in zip(ways, ran["runs"], strict=True):
        course = Course((Move(samples=0, depth=depth),), found["samples_per_epoch"], found["epochs"])
        predicted = simulate(profile, cluster, course, ranks=ranks, batch=found["batch"], cache=mode != "off")
        runs.append(
            {
                "depth": depth,
                "cache": mode,
                "predicted": predicted.seconds,
                "predicted_steps": predicted.steps,
                **run,
                "error": predicted.seconds / run["seconds"] - 1,
            }
        )
        print(f"{ranks} process(es), {json.dumps(runs[-1])}", flush=True)
    return {"ranks": ranks, "link": ran["link"], "measured": found["measured"], "profile": found["profile"],
            "runs": runs, "median_error": statistics.median(abs(run["error"]) for run in runs)}  # fmt: skip


def measured_profile(recipe: str, settings: list[str], ranks: int) -> dict[str, Any]:
    """The numbers of a forecast, from which every way is predicted."""
    torch.set_num_threads(1)
    # What joins them is not known yet; of the forecast only what was measured is used.
    cluster = Cluster(device_memory=ALONE.device_memory, between=Link(bytes_per_second=math.inf))
    return forecast(load_recipe(recipe, [*settings, "freeze={policy: none}"]), ranks=ranks, cluster=cluster).numbers()


def _profile(recipe: str, settings: list[str], ranks: int) -> dict[str, Any]:
    if ranks == 1:
        return measured_profile(recipe, settings, ranks)
    found: dict[int, dict[str, Any]] = {}
    given = dict.fromkeys(range(ranks), (recipe, settings, ranks))
    abreast(measured_profile, given, found.__setitem__, at_once=ranks)
    return found[0]


def _run(recipe: str, ways: list[list[str]], ranks: int) -> dict[str, Any]:
    """Each way, one after the other; of several ranks what the first one says."""
    if ranks == 1:
        with tempfile.TemporaryDirectory() as folder:
            return {"link": None, "runs": [train(recipe, way, Path(folder)) for way in ways]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ways.json").write_text(json.dumps({"recipe": recipe, "ways": ways}), encoding="utf-8")
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                "-m", "benchmarks.forecast_ranks", folder,
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            check=True,
        )  # fmt: skip
        result: dict[str, Any] = json.loads((Path(folder) / "rank0.json").read_text(encoding="utf-8"))
        return result


if __name__ == "__main__":
    sys.exit(main())
