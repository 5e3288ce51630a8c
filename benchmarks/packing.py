"""What packing saves: the same recipe launched without it and with it, seed by seed, whole launches in turn.

    python benchmarks/packing.py efficiency     # 4 ranks, and the same batch on fewer: CPU-seconds, rank-seconds
    python benchmarks/packing.py performance    # 2 ranks, and larger batches on both: steps, time, accuracy

Ranks are gloo processes of one thread each. With more ranks than cores only CPU-seconds mean something (of all
processes, their start included); with two, times do too, on a quiet machine. The loss of accuracy (without packing
minus with it, in points) is compared item by item on the test split, as accuracy.py does. A run that was cut off goes
on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

from benchmarks.accuracy import accuracy_loss, paired  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from frostline.events import TRAINING_PHASES, read_events  # noqa: E402
from frostline.launcher import Hosts, launch  # noqa: E402
from frostline.packing import Stages, account  # noqa: E402
from frostline.recipes.runner import prepare  # noqa: E402
from frostline.recipes.schema import load_recipe  # noqa: E402

# Of each mode: ranks, and what the recipe gets on both sides. A batch of 16 on all ranks, as the recipe has it.
MODES: dict[str, tuple[int, list[str]]] = {
    "efficiency": (4, ["training.per_device_train_batch_size=4"]),
    "performance": (2, ["training.per_device_train_batch_size=8"]),
}
SIDES = {"full": "none", "ours": None}  # by the names that accuracy.py has for what is compared


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, on both sides")
    parser.add_argument("--recipe", default="trec")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0..N-1 (default 2)")
    parser.add_argument("--out", type=Path, help="results file (default results/packing-MODE.json)")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    out = options.out or RESULTS / f"packing-{options.mode}.json"
    ranks, changes = MODES[options.mode]
    settings = {"recipe": options.recipe, "ranks": ranks, "overrides": [*changes, "threads=1", *options.overrides]}
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if report.get("settings") != settings:
        report = {**made_by("packing.py", 0, "cpu"), "settings": settings, "runs": []}
    for seed in range(options.seeds):
        for side in sorted(SIDES, reverse=bool(seed % 2)):
            if (side, seed) not in {(run["side"], run["seed"]) for run in report["runs"]}:
                mode = SIDES[side] or options.mode
                report["runs"].append({"side": side, **one_launch(settings, mode, seed)})
                if {run["side"] for run in report["runs"]} == SIDES.keys():
                    report["comparison"] = compared(report["runs"])
                write(report, out)
    print(json.dumps(report["comparison"], indent=2))
    return 0


def one_launch(settings: dict[str, Any], mode: str, seed: int) -> dict[str, Any]:
    """Launch the recipe once; what it took, and which test items it gets right."""
    folder = Path(tempfile.mkdtemp(prefix="frostline-packing-"))
    given = [*settings["overrides"], f"pack.mode={mode}", f"seed={seed}", f"output_dir={folder / 'run'}"]
    try:
        run = launch(settings["recipe"], given, Hosts(settings["ranks"]))
        assert run is not None
        stages, entries = Stages.read(run), account(run)
        assert stages is not None
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        return {
            "seed": seed,
            "mode": mode,
            "steps": summary["steps"],
            "samples": summary["samples"],
            "trajectory": summary["trajectory"],
            "stages": [stage.numbers() for stage in stages.stages],
            "looks": [{"samples": look.samples, **look.numbers} for look in stages.looks],
            "starts": [vars(entry) for entry in entries],
            "seconds": sum(entry.seconds for entry in entries),
            "training_seconds": sum(summary["seconds"][phase] for phase in TRAINING_PHASES),
            "rank_seconds": sum(3600 * entry.rank_hours for entry in entries),
            "cpu_seconds": sum(entry.cpu_seconds for entry in entries),
            "losses": [[e["samples"], e["loss"]] for e in read_events(run / "events.jsonl") if e["event"] == "loss"],
            "correct": right(run, load_recipe(settings["recipe"], given)),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def right(run: Path, recipe: Any) -> str:
    """Which items of the test split the saved model gets right, a 1 or a 0 for each."""
    data = prepare(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, per_device_eval_batch_size=64, report_to="none")
        found = Trainer(model=model, args=arguments, data_collator=data.collator).predict(data.test)  # type: ignore[arg-type]
    assert found.label_ids is not None
    chosen = np.argmax(found.predictions, axis=-1)
    return "".join(str(int(hit)) for hit in chosen == found.label_ids)


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Without packing over with it, for the seeds that have both, and the loss of accuracy."""
    seeds, sides = paired(runs)
    if not seeds:
        return {}
    ratios = {
        name: [full[name] / ours[name] for full, ours in zip(sides["full"], sides["ours"], strict=True)]
        for name in ("cpu_seconds", "rank_seconds", "seconds", "training_seconds", "steps")
    }
    gaps = []
    for full, ours in zip(sides["full"], sides["ours"], strict=True):
        there = dict(map(tuple, full["losses"]))
        gaps.append(max((abs(loss - there[at]) for at, loss in ours["losses"] if at in there), default=0))
    return {
        "ratios": {name: {"median": float(np.median(found)), "per_seed": found} for name, found in ratios.items()},
        "largest_gap_of_losses": gaps,
        **accuracy_loss(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
