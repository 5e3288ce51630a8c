"""What the storage manager changes at the same trajectory: nothing in accuracy, and how much in time.

    python benchmarks/ways.py trec --seeds 2 --threads 2     # writes benchmarks/results/ways-trec.json
    python benchmarks/ways.py 20newsgroups data.train_limit=1500 cache.mode=memory

For every seed the recipe runs four times from the same initial weights, in a new random order: without a cache; with
ours; with the published way (AutoFreeze, section 3.3, arXiv 2102.01386: the depth is taken when an epoch starts and
holds until it ends); and with ours but without upgrades (records of a shallower line are thrown away when it moves).
Reported: training time against the run without a cache; how many samples were computed from the input, upgraded and
read; whether the trajectories are the same; and after each epoch by how many items of the validation split, and at the
end of the test split, the cached run differs from the uncached one.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import spread  # noqa: E402
from frostline.blocks import BlockStack  # noqa: E402
from frostline.cache import CacheManager  # noqa: E402
from frostline.events import TRAINING_PHASES, environment  # noqa: E402
from frostline.recipes.runner import prepare, run  # noqa: E402
from frostline.recipes.schema import load_recipe  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MOST_ITEMS = 3


class Latching(CacheManager):
    """As published: a move of the frost line reaches the cache when the next epoch starts."""

    _left: float | None = None
    _due: tuple[BlockStack, int] | None = None

    def moved(self, stack: BlockStack, depth: int) -> None:
        """Wait with it, unless the run has not begun."""
        if self._left is None:
            super().moved(stack, depth)
        else:
            self._due = stack, depth

    def agree(self) -> None:
        """Called after each step: has an epoch begun?"""
        super().agree()
        if self._clock.epochs_left != self._left and self._due is not None:
            super().moved(*self._due)
            self._due = None
        self._left = self._clock.epochs_left


class Anew(CacheManager):
    """Records of a shallower line are of no use: each sample is computed again from its input."""

    def moved(self, stack: BlockStack, depth: int) -> None:
        """Throw them away."""
        if depth != self.depth:
            self.store.clear()
        super().moved(stack, depth)


WAYS: dict[str, type[CacheManager] | None] = {
    "uncached": None,
    "ours": CacheManager,
    "latching": Latching,
    "anew": Anew,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a shipped recipe or a YAML file, with a cache")
    parser.add_argument("overrides", nargs="*", help="dotted overrides that hold for every side")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0..N-1 (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--out", type=Path, help="results file (default benchmarks/results/ways-<recipe>.json)")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    order = random.Random(0)
    runs: list[dict[str, Any]] = []
    out = options.out or RESULTS / f"ways-{Path(options.recipe).stem}.json"
    for seed in range(options.seeds):
        for way in order.sample(options.ways, len(options.ways)):
            runs.append(_run(options.recipe, options.overrides, way, seed))
            print(json.dumps(runs[-1]), flush=True)
            command = f"python benchmarks/ways.py {options.recipe} --seeds {options.seeds} --threads {options.threads}"
            report = {
                "command": " ".join([command, *options.overrides]),
                "date": time.strftime("%Y-%m-%d"),
                "environment": environment(),
                "comparison": compare(runs),
                "runs": runs,
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(compare(runs), indent=1))


def _run(name: str, overrides: list[str], way: str, seed: int) -> dict[str, Any]:
    off = ["cache.mode=off"] if way == "uncached" else []
    with tempfile.TemporaryDirectory() as folder, _managed_by(WAYS[way]):
        recipe = load_recipe(name, [*overrides, *off, f"seed={seed}", f"output_dir={folder}/run", "baseline=none"])
        data = prepare(recipe)
        summary = run(recipe).summary
        events = [json.loads(line) for line in (Path(folder) / "run" / "events.jsonl").read_text().splitlines()]
    gc.collect()
    accuracies = [e["metrics"]["accuracy"] for e in events if e["event"] == "evaluation"]
    assert data.validation is not None
    assert data.test is not None
    return {
        "seed": seed,
        "way": way,
        "train_seconds": sum(summary["seconds"][phase] for phase in TRAINING_PHASES),
        "trajectory": [(move["step"], move["depth"]) for move in summary["trajectory"]],
        "cache": summary["cache"],
        "right": [round(accuracy * len(data.validation)) for accuracy in accuracies],
        "right_of_test": round(summary["test"]["accuracy"] * len(data.test)),
    }


@contextmanager
def _managed_by(manager: type[CacheManager] | None) -> Iterator[None]:
    with mock.patch("frostline.engine.CacheManager", manager or CacheManager):
        yield


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every way against the run without a cache of the same seed."""
    by = {(r["way"], r["seed"]): r for r in runs}
    found: dict[str, Any] = {}
    for way in WAYS:
        pairs = [(by["uncached", s], by[way, s]) for w, s in by if w == way and ("uncached", s) in by]
        if way == "uncached" or not pairs:
            continue
        found[way] = {
            "speedup_over_uncached": spread([plain["train_seconds"] / ours["train_seconds"] for plain, ours in pairs]),
            "same_trajectory": all(plain["trajectory"] == ours["trajectory"] for plain, ours in pairs),
            "items_apart_per_epoch": [
                [abs(a - b) for a, b in zip(plain["right"], ours["right"], strict=True)] for plain, ours in pairs
            ],
            "test_items_apart": [abs(plain["right_of_test"] - ours["right_of_test"]) for plain, ours in pairs],
            "most_items": MOST_ITEMS,
            "samples": {
                name: [ours["cache"][name] for _, ours in pairs] for name in ("misses", "upgrades", "hits", "written")
            },
        }
    return found


if __name__ == "__main__":
    main()
