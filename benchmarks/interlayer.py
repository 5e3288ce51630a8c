"""Accuracy of SlimFit's way (policy ``interlayer``, compression ``slimfit``) against full fine-tuning, on real data.

    python benchmarks/interlayer.py --tasks trec    # one task: at most 40 minutes on two cores, beside its tuning
    python benchmarks/interlayer.py                 # all that results/interlayer.json has not yet
    python benchmarks/interlayer.py --share 0.5     # another share: writes results/interlayer-share-0.5.json
    python benchmarks/interlayer.py --share 0.34 --within kind    # results/interlayer-share-0.34-kind.json
    python benchmarks/interlayer.py --share 0.34 --within kind --rate same    # ...-kind-same.json
    python benchmarks/interlayer.py --share 0       # compression alone: results/interlayer-share-0.json

Each side has a learning rate of its own, tuned alike: the one with the best validation accuracy (then the least
validation loss) among three, by a seed that is not compared; where the best is the highest or the lowest, the next one
is tried as well, twice at most. Ours is tuned so at each share of resting layers (SlimFit chooses its share by task,
too), and the better one is taken. Then both sides run from the same initial weights for each seed, two runs at a time
with a thread each: accuracy is the figure here, not time. The loss (full minus ours, in points) is compared item by
item on the test split, as accuracy.py does, and pooled with every task counting alike. A run that was cut off goes on
where it stopped.

With ``--share`` the runs of full fine-tuning are those of results/interlayer.json that were made on a device like this
one, and ours runs with the share that was given, at the rate that ``--rate`` names: ``between`` is the geometric mean
of the two that were found there; ``same`` is full fine-tuning's, as for somebody who adds one line and changes nothing
else; ``tuned`` is the better of that and twice that on validation, by the seed that is not compared (where no more than
half rests, what a layer loses in steps lies between them). With ``--share 0`` nothing rests: it is full fine-tuning, at
its rate, with its activations compressed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.abreast import abreast  # noqa: E402
from benchmarks.accuracy import SIDES, accuracy_loss, interval, losses, one_run, paired, resampled  # noqa: E402
from benchmarks.reports import RESULTS, accelerator, made_by, write  # noqa: E402

# Of which size a task is, so that the runs that are compared end within 40 minutes (tuning takes one to two hours).
TASKS: dict[str, list[str]] = {
    "trec": ["training.num_train_epochs=3"],
    "movie": ["data.train_limit=4000"],
    "20newsgroups": ["data.train_limit=1500", "data.test_limit=4000", "max_length=64", "training.num_train_epochs=4"],
    "fashion-mnist": ["data.train_limit=1000"],
    "fashion-mnist-cnn": ["data.train_limit=3000"],
}
RATES = {
    "trec": (5e-5, 1e-4, 2e-4),
    "movie": (2.5e-5, 5e-5, 1e-4),
    "20newsgroups": (1e-4, 2e-4, 4e-4),
    "fashion-mnist": (3e-5, 6e-5, 1.2e-4),
    "fashion-mnist-cnn": (5e-4, 1e-3, 2e-3),
}
CHANGES = {
    "full": ["freeze={policy: none}"],
    "ours": ["memory.level=slimfit"],
}
# Of the layers that rest at each step; full fine-tuning has none.
SHARES: dict[str, tuple[float, ...]] = {"full": (0.0,), "ours": (0.9, 0.75)}
BOTH = ["cache.mode=off", "schedule=null"]
OUR_RATES = ("between", "same", "tuned")
TUNING_SEED = 100
MOST_BEYOND = 2
TARGET = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0..N-1 (default 3)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, a thread each (default 2)")
    parser.add_argument(
        "--share", type=float, help="let this share rest (0: none), with the learning rates that were found"
    )
    parser.add_argument("--within", choices=("model", "kind"), default="model", help="ranked together (default model)")
    parser.add_argument("--rate", choices=OUR_RATES, default="between", help="of ours, with --share (default between)")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.share is None and options.within != "model":
        parser.error("--within kind goes with --share")
    if not options.share and options.rate != "between":
        parser.error(f"--rate {options.rate} goes with a --share above 0: without one, both sides are tuned")
    tuned = RESULTS / "interlayer.json"
    how = "-kind" * (options.within == "kind") + f"-{options.rate}" * (options.rate != "between")
    out = options.out or (tuned if options.share is None else RESULTS / f"interlayer-share-{options.share:g}{how}.json")
    report = _read(out)
    for name in options.tasks:
        fresh = _fresh(name) if options.share is None else _with_share(_read(tuned)["tasks"][name], options)
        earlier = report["tasks"].get(name)
        found = earlier if earlier is not None and earlier["settings"] == fresh["settings"] else fresh
        report["tasks"][name] = found

        def save() -> None:
            report["pooled"] = pooled(report["tasks"], options.seeds)
            write(report, out)

        if options.share is None:
            tune(found, name, SIDES, options.at_once, save)
        elif options.rate == "tuned":
            tune(found, name, ("ours",), options.at_once, save)
        measure(found, name, options.seeds, options.at_once, save)
        print(name, json.dumps({"rates": found["rates"], "shares": found["shares"], **found["comparison"]}))
    print(json.dumps(report["pooled"]))
    return 0


def _fresh(name: str) -> dict[str, Any]:
    """A task of which nothing has run. What there is of it counts if it was made as it would be now."""
    settings = {
        "overrides": [*TASKS[name], *BOTH],
        "changes": CHANGES,
        "rates": list(RATES[name]),
        "shares": list(SHARES["ours"]),
        "tuning": [TUNING_SEED, MOST_BEYOND],
    }
    return {
        "settings": settings,
        **made_by("interlayer.py", TUNING_SEED, accelerator()),
        "rates": {},
        "shares": {},
        "at_the_end": {},
        "tuning": [],
        "runs": [],
    }


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tasks": {}}
    return found


def _with_share(tuned: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What is known of a task before ours has run with another share than the one that was tuned."""
    other = "ours" if options.share and options.rate != "same" else "full"
    full = tuned["rates"]["full"]
    between = math.sqrt(full * tuned["rates"][other])
    return {
        "settings": {
            **tuned["settings"],
            "shares": [options.share],
            "tuning": None,
            **({"rates": [full, 2 * full], "tuning": [TUNING_SEED, 0]} if options.rate == "tuned" else {}),
            **({"rate": options.rate} if options.rate != "between" else {}),
            **({"within": options.within} if options.within != "model" else {}),
        },
        **made_by("interlayer.py", TUNING_SEED, accelerator()),
        "rates": {"full": full, "ours": float(f"{between:.3g}")},
        "at_the_end": {"full": tuned["at_the_end"]["full"], "ours": tuned["at_the_end"][other]},
        "shares": {"full": 0.0, "ours": options.share},
        "tuning": [],
        # Another device rounds otherwise, and training makes much of that.
        "runs": [run for run in tuned["runs"] if run["side"] == "full" and run["device"] == accelerator()],
    }


def _run(name: str, side: str, rate: float, seed: int, share: float, within: str) -> dict[str, Any]:
    changes = [*TASKS[name], *BOTH, *CHANGES[side], f"training.learning_rate={rate}"]
    if side == "ours":
        rests = f"{{policy: interlayer, share: {share}, within: {within}}}" if share else "{policy: none}"
        changes.append(f"freeze={rests}")
    return one_run(name, changes, seed, 1)


def tune(found: dict[str, Any], name: str, sides: Sequence[str], at_once: int, save: Any) -> None:
    """Learning rate and share of ``sides``: into ``found["rates"]`` and ``found["shares"]``; ``tuning``: all tries."""
    settings = found["settings"]
    shares = {**SHARES, "ours": settings["shares"]}
    beyond = settings["tuning"][1]

    def tried(side: str, share: float | None = None) -> list[dict[str, Any]]:
        return [t for t in found["tuning"] if t["side"] == side and share in (None, t["share"])]

    def done(key: tuple[str, float, float], run: dict[str, Any]) -> None:
        side, share, rate = key
        found["tuning"].append({"side": side, "share": share, "rate": rate, "validation": run["validation"]})
        save()

    while missing := {
        (side, share, rate): (name, side, rate, TUNING_SEED, share, _within(found))
        for side in sides
        for share in shares[side]
        for rate in _wanted(tried(side, share), settings["rates"], beyond)
    }:
        abreast(_run, missing, done, at_once=at_once)
    for side in sides:
        best = _best(tried(side))
        rates = {t["rate"] for t in tried(side, best["share"])}
        found["rates"][side], found["shares"][side] = float(best["rate"]), best["share"]
        # Whether a higher or lower rate might have done better still. Where none is tried beyond, there is a reason.
        found["at_the_end"][side] = beyond > 0 and best["rate"] in (min(rates), max(rates))


def _wanted(tried: list[dict[str, Any]], rates: Sequence[float], beyond: int) -> list[float]:
    """Rates that are still to be tried: those of the grid, then one beyond the end at which the best lies."""
    known = sorted(t["rate"] for t in tried)
    if missing := [rate for rate in rates if rate not in known]:
        return missing
    best = float(_best(tried)["rate"])
    if len(known) >= len(rates) + beyond or best not in (known[0], known[-1]):
        return []
    return [best * 2 if best == known[-1] else best / 2]


def _within(found: dict[str, Any]) -> str:
    within: str = found["settings"].get("within", "model")
    return within


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    return max(tried, key=lambda t: (t["validation"]["accuracy"], -t["validation"]["loss"]))


def measure(found: dict[str, Any], name: str, seeds: int, at_once: int, save: Any) -> None:
    """Both sides at their rates, for every seed that is not there yet."""

    def done(key: tuple[str, int], run: dict[str, Any]) -> None:
        found["runs"].append({"side": key[0], **run})
        found["comparison"] = accuracy_loss(found["runs"]) if paired(found["runs"])[0] else {}
        save()

    known = {(run["side"], run["seed"]) for run in found["runs"]}
    jobs = {
        (side, seed): (
            name,
            side,
            found["rates"][side],
            seed,
            found["shares"][side],
            _within(found),
        )
        for seed in range(seeds)
        for side in SIDES
        if (side, seed) not in known
    }
    abreast(_run, jobs, done, at_once=at_once)


def pooled(tasks: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The loss over all tasks that have runs of both sides, each counting alike; judged once none is missing."""
    found = {name: losses(task["runs"]) for name, task in tasks.items() if paired(task["runs"])[0]}
    if not found:
        return {}
    # All are resampled from the same seed: shuffled, so that the tasks' draws do not move together.
    draws = [np.random.default_rng(i).permutation(resampled(loss)) for i, loss in enumerate(found.values())]
    low, high = interval(np.mean(draws, axis=0))
    return {
        "tasks": list(found),
        "mean": float(np.mean([loss.mean() for loss in found.values()])),
        "interval_95": [low, high],
        "target": TARGET,
        "met": high <= TARGET
        if found.keys() == TASKS.keys() and all(len(x) >= seeds for x in found.values())
        else None,
    }


if __name__ == "__main__":
    sys.exit(main())
