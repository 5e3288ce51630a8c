"""Accuracy and training time of freezing against plain fine-tuning: paired by seed and interleaved in one run.

    python benchmarks/accuracy.py trec --seeds 5            # writes benchmarks/results/accuracy-trec.json
    python benchmarks/accuracy.py 20newsgroups --seeds 3 data.train_limit=1500

For every seed the recipe runs twice, with its own policy and cache and with policy ``none``, from the same initial
weights. The two sides are two processes that take turns of a few seconds, so that what slows the machine for a while
slows both (the side that goes first alternates); a side that stands still does not count its time. Training time is the
time inside training steps, data waiting, gradient statistics, decisions and the cache's checks and writes included;
total time runs from data preparation to the saved model. The accuracy loss (plain minus ours, in points) is compared
item by item on the test split; its 95 % interval comes from a bootstrap over items and seeds. A run that was cut off
goes on with the seed at which it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Job, in_turns  # noqa: E402
from frostline.events import TRAINING_PHASES, environment  # noqa: E402
from frostline.recipes.runner import prepare, run  # noqa: E402
from frostline.recipes.schema import Recipe, load_recipe  # noqa: E402
from frostline.tasks.registry import TASKS  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SIDES = ("full", "ours")
# Seconds of a turn: in the proportion in which they need them, so that both are done at about the same time.
TURNS = {"full": 4.5, "ours": 2.5}
DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a shipped recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", help="dotted overrides that hold for both sides")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0..N-1 (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (default 1)")
    parser.add_argument("--out", type=Path, help="results file (default benchmarks/results/accuracy-<recipe>.json)")
    options = parser.parse_intermixed_args()
    out = options.out or RESULTS / f"accuracy-{Path(options.recipe).stem}.json"
    torch.set_num_threads(options.threads)
    command = f"python benchmarks/accuracy.py {options.recipe} --seeds {options.seeds} --threads {options.threads}"
    settings = {"recipe": options.recipe, "overrides": options.overrides, "threads": options.threads}
    report = _load(out, settings, options.seeds) or {
        "command": " ".join([command, *options.overrides]),
        "date": time.strftime("%Y-%m-%d"),
        "settings": settings,
        "environment": environment(),
        "runs": [],
    }
    done = {r["seed"] for r in report["runs"]}
    for seed in sorted(set(range(options.seeds)) - done):
        sides = SIDES if seed % 2 == 0 else SIDES[::-1]
        given = {side: (options.recipe, options.overrides, side, seed, options.threads) for side in sides}
        found = in_turns({side: Job(one_run, given[side], TURNS[side]) for side in sides})
        report["runs"] += [found[side] for side in sides]
        report["comparison"] = compare(report["runs"])
        _write(out, report)
        for side in sides:
            print(json.dumps({k: v for k, v in found[side].items() if k != "correct"}), flush=True)
    print(json.dumps(report["comparison"], indent=2))


def one_run(name: str, overrides: list[str], side: str, seed: int, threads: int) -> dict[str, Any]:
    """Run one side and test the model that it saved."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        policy = [] if side == "ours" else ["freeze={policy: none}"]
        recipe = load_recipe(name, [*overrides, *policy, f"seed={seed}", f"output_dir={folder}/run", "baseline=none"])
        started = time.time()
        summary = run(recipe, started=started).summary
        correct = _correct(recipe, Path(folder) / "run" / "model")
        shutil.rmtree(Path(folder) / "run")
    return {
        "seed": seed,
        "side": side,
        "policy": summary["policy"],
        "train_seconds": sum(summary["seconds"][phase] for phase in TRAINING_PHASES),
        "total_seconds": summary["seconds"]["total"],
        "seconds": summary["seconds"],
        "steps": summary["steps"],
        "validation": summary["metrics"],
        "test": summary["test"],
        "trajectory": summary["trajectory"],
        "cache": summary["cache"],
        "limits": summary["limits"],
        "correct": "".join(str(int(c)) for c in correct),
    }


def _correct(recipe: Recipe, model_path: Path) -> list[bool]:
    """Which test items the saved model gets right, in the order of the file."""
    data = prepare(recipe)
    rows = data.test
    assert rows is not None
    model = TASKS[recipe.task].build_model(data, str(model_path), recipe.seed).eval()
    right: list[bool] = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = data.collator([rows[i] for i in range(start, min(start + 64, len(rows)))])
            labels = batch.pop("labels")
            right += (model(**batch).logits.argmax(-1) == labels).tolist()
    return right


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed-up and accuracy loss over the seeds that have both sides."""
    sides = {side: {r["seed"]: r for r in runs if r["side"] == side} for side in SIDES}
    seeds = sorted(set(sides["full"]) & set(sides["ours"]))
    if not seeds:
        return {}
    right = {side: np.array([[int(c) for c in sides[side][s]["correct"]] for s in seeds]) for side in SIDES}
    loss = 100.0 * (right["full"] - right["ours"])  # [seeds, items], points
    generator = np.random.default_rng(0)
    draws = [
        loss[generator.integers(0, loss.shape[0], loss.shape[0])][
            :, generator.integers(0, loss.shape[1], loss.shape[1])
        ].mean()
        for _ in range(DRAWS)
    ]
    return {
        "seeds": seeds,
        "train_speedup": _spread(_ratio(sides, seeds, "train_seconds")),
        "total_speedup": _spread(_ratio(sides, seeds, "total_seconds")),
        "accuracy": {side: [float(100 * row.mean()) for row in right[side]] for side in SIDES},
        "loss_points": {
            "mean": float(loss.mean()),
            "per_seed": [float(row.mean()) for row in loss],
            "interval_95": [float(v) for v in np.percentile(draws, [2.5, 97.5])],
        },
    }


def _ratio(sides: dict[str, dict[int, dict[str, Any]]], seeds: list[int], key: str) -> list[float]:
    return [sides["full"][s][key] / sides["ours"][s][key] for s in seeds]


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values), "per_seed": values}


def _load(path: Path, settings: dict[str, Any], seeds: int) -> dict[str, Any] | None:
    """An earlier report of the same settings, if it was cut off."""
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report if report["settings"] == settings and len(report["runs"]) < 2 * seeds else None


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
