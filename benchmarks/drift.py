"""Whether training with compressed activations goes astray: 500 steps at each level, against exact ones.

    python benchmarks/drift.py trec     # writes benchmarks/results/drift-trec.json

The recipe's model trains in full (nothing frozen, nothing resting) from the same weights, with the same batches and the
same dropout at every level; for each seed the validation loss and the test accuracy are compared with those of the
exact run of that seed. Target: the mean distance is no larger than that of two exact runs of different seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.abreast import abreast  # noqa: E402
from benchmarks.accuracy import one_run  # noqa: E402
from benchmarks.reports import RESULTS, accelerator, made_by, write  # noqa: E402
from frostline.memory import LEVELS  # noqa: E402

_CHANGES = ["freeze={policy: none}", "cache.mode=off"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="trec", help="a shipped recipe or a YAML file (default trec)")
    parser.add_argument("overrides", nargs="*", help="dotted overrides of the recipe")
    parser.add_argument("--steps", type=int, default=500, help="steps of training (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0..N-1 (default 3)")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["off", "safe", "slimfit", "max"])
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, a thread each (default 2)")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/drift-<recipe>.json")
    options = parser.parse_intermixed_args(arguments)
    out = options.out or RESULTS / f"drift-{Path(options.recipe).stem}.json"
    settings = {"recipe": options.recipe, "overrides": options.overrides, "steps": options.steps}
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    report = earlier if earlier.get("settings") == settings else {
        "settings": settings, **made_by("drift.py", 0, accelerator()), "runs": [],
    }  # fmt: skip

    def done(key: tuple[str, int], run: dict[str, Any]) -> None:
        report["runs"].append(
            {"level": key[0], "seed": key[1], "loss": run["validation"]["loss"], "accuracy": run["test"]["accuracy"]}
        )
        report["levels"] = compare(report["runs"])
        write(report, out)

    known = {(run["level"], run["seed"]) for run in report["runs"]}
    jobs = {
        (level, seed): (
            options.recipe,
            [*options.overrides, *_CHANGES, f"memory.level={level}", f"training.max_steps={options.steps}"],
            seed,
            1,
        )
        for seed in range(options.seeds)
        for level in options.levels
        if (level, seed) not in known
    }
    abreast(one_run, jobs, done, at_once=options.at_once)
    print(json.dumps(report["levels"], indent=1))
    return 0


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each level against the exact runs of the same seeds; how far those are from each other."""
    found: dict[str, Any] = {}
    by = {(run["level"], run["seed"]): run for run in runs}
    for level in dict.fromkeys(run["level"] for run in runs):
        seeds = [seed for of, seed in by if of == level and ("off", seed) in by]
        if not seeds:
            continue
        row: dict[str, Any] = {"seeds": seeds}
        for figure in ("loss", "accuracy"):
            exact, ours = ([by[of, seed][figure] for seed in seeds] for of in ("off", level))
            distance = mean(abs(a - b) for a, b in zip(exact, ours, strict=True))
            spread = mean([abs(a - b) for a, b in itertools.combinations(exact, 2)] or [0.0])
            row[figure] = {
                "mean": mean(ours),
                "apart": mean(ours) - mean(exact),
                "distance": distance,
                "spread": spread,
                "met": distance <= spread,
            }
        found[level] = row
    return found


if __name__ == "__main__":
    sys.exit(main())
