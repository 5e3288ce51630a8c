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

from benchmarks.reports import accelerator  # noqa: E402
from benchmarks.turns import Job, in_turns  # noqa: E402
from frostline.events import TRAINING_PHASES, environment  # noqa: E402
from frostline.recipes.runner import prepare, run  # noqa: E402
from frostline.recipes.schema import Recipe, load_recipe  # noqa: E402
from frostline.tasks.registry import TASKS  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SIDES = ("full", "ours")
CHANGES = {"full": ["freeze={policy: none}"], "ours": []}
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
        given = {side: (options.recipe, [*options.overrides, *CHANGES[side]], seed, options.threads) for side in sides}
        found = in_turns({side: Job(one_run, given[side], TURNS[side]) for side in sides})
        report["runs"] += [{"side": side, **found[side]} for side in sides]
        report["comparison"] = compare(report["runs"])
        _write(out, report)
        for side in sides:
            print(side, json.dumps({k: v for k, v in found[side].items() if k != "correct"}), flush=True)
    print(json.dumps(report["comparison"], indent=2))


def one_run(name: str, overrides: list[str], seed: int, threads: int) -> dict[str, Any]:
    """Run a recipe and test the model that it saved."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(name, [*overrides, f"seed={seed}", f"output_dir={folder}/run", "baseline=none"])
        started = time.time()
        summary = run(recipe, started=started).summary
        correct = _correct(recipe, Path(folder) / "run" / "model")
        shutil.rmtree(Path(folder) / "run")
    return {
        "seed": seed,
        "device": accelerator(),
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
    device = accelerator()
    model = TASKS[recipe.task].build_model(data, str(model_path), recipe.seed).eval().to(device)
    right: list[bool] = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = data.collator([rows[i] for i in range(start, min(start + 64, len(rows)))])
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")
            right += (model(**batch).logits.argmax(-1) == labels).tolist()
    return right


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed-up and accuracy loss over the seeds that have both sides."""
    seeds, sides = paired(runs)
    if not seeds:
        return {}
    return {
        "seeds": seeds,
        "train_speedup": _spread(_ratio(sides, "train_seconds")),
        "total_speedup": _spread(_ratio(sides, "total_seconds")),
        **accuracy_loss(runs),
    }


def accuracy_loss(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of both sides in percent, and the loss, item by item, over the seeds that have both."""
    right = {side: 100.0 * _right(chosen) for side, chosen in paired(runs)[1].items()}
    loss = losses(runs)
    return {
        "accuracy": {side: [float(row.mean()) for row in rows] for side, rows in right.items()},
        "loss_points": {
            "mean": float(loss.mean()),
            "per_seed": [float(row.mean()) for row in loss],
            "interval_95": interval(resampled(loss)),
        },
    }


def paired(runs: list[dict[str, Any]]) -> tuple[list[int], dict[str, list[dict[str, Any]]]]:
    """The seeds that both sides have, and the runs of each side for them, in that order."""
    sides = {side: {r["seed"]: r for r in runs if r["side"] == side} for side in SIDES}
    seeds = sorted(set(sides["full"]) & set(sides["ours"]))
    return seeds, {side: [chosen[seed] for seed in seeds] for side, chosen in sides.items()}


def losses(runs: list[dict[str, Any]]) -> np.ndarray:
    """Plain minus ours ``[seeds, items]``, in points, for the seeds that have both sides."""
    _, sides = paired(runs)
    return 100.0 * (_right(sides["full"]) - _right(sides["ours"]))


def _right(runs: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[int(c) for c in run["correct"]] for run in runs])


def resampled(loss: np.ndarray) -> np.ndarray:
    """Mean losses of 10,000 bootstrap draws over seeds and items of ``loss`` ``[seeds, items]``, in points."""
    generator = np.random.default_rng(0)
    return np.array(
        [
            loss[generator.integers(0, loss.shape[0], loss.shape[0])][
                :, generator.integers(0, loss.shape[1], loss.shape[1])
            ].mean()
            for _ in range(DRAWS)
        ]
    )


def interval(draws: np.ndarray) -> list[float]:
    """Between which 95 % of ``draws`` lie."""
    return [float(value) for value in np.percentile(draws, [2.5, 97.5])]


def _ratio(sides: dict[str, list[dict[str, Any]]], key: str) -> list[float]:
    return [plain[key] / ours[key] for plain, ours in zip(sides["full"], sides["ours"], strict=True)]


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
