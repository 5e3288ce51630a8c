"""The README's tables, in Markdown, made from ``benchmarks/results/*.json``.

python benchmarks/table.py                                             # every result there is
python benchmarks/table.py benchmarks/results/step_time-minilm.json    # these only
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import interval, machine, rows, word  # noqa: E402
from benchmarks.memory_tables import budgets, drift, gradients, interlayer, memory, memory_time, resting  # noqa: E402
from benchmarks.rank_tables import distributed, packing  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results (default: all under benchmarks/results)")
    for path in parser.parse_args(arguments).files or sorted(RESULTS.glob("*.json")):
        if path.name.endswith(".part.json"):  # of a run that was stopped
            continue
        make = TABLES.get(path.stem.partition("-")[0])
        if make is not None:
            print("\n".join(make(json.loads(path.read_text(encoding="utf-8")))), end="\n\n")


def step_time(report: dict[str, Any]) -> Iterable[str]:
    """What ``step_time.py`` measured."""
    for measured in report.get("depths", ()):
        batch, rounds = _batch(measured["batch"]), measured["rounds"]
        yield f"A step of {report['model']} by depth, {batch}, median of {rounds} rounds:\n"
        yield from rows(
            ["depth", "Frostline, ms", "bound, ms", "ratio", "95 % interval"],
            ([row["depth"], *_times(row), *interval(row["ratio"])] for row in measured["depths"]),
        )
        yield ""
    if none := report.get("none"):
        yield f"Policy `none` on {report['model']}, {_batch(none['batch'])}, loops of {none['steps']} steps:\n"
        yield from rows(
            ["loop", "pairs", "with / without", "95 % interval", "contains 1.00"],
            (
                [name, row["ratio"]["pairs"], *interval(row["ratio"], 4), word(row["contains_one"])]
                for name, row in ((name, none[name]) for name in ("loop", "trainer"))
            ),
        )
        yield ""
    if found := report.get("statistics"):
        yield f"Gradient statistics on {report['model']} at depth 0 (all blocks are summed):\n"
        yield from rows(
            ["batch", "of a step", "95 % interval", "memory, MB", "one evaluation, ms"],
            (
                [
                    _batch(row["batch"]),
                    f"{row['share']['median']:.2%}",
                    " to ".join(f"{value:.2%}" for value in row["share"]["interval"]),
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{1000 * row['evaluation_seconds']:.1f}",
                ]
                for row in found
            ),
        )
        yield ""
    yield machine(report)


def accuracy(report: dict[str, Any]) -> Iterable[str]:
    """What ``accuracy.py`` measured."""
    found = report["comparison"]
    seeds, loss, speed = found["seeds"], found["loss_points"], found["train_speedup"]
    low, high = loss["interval_95"]
    sides = {side: {run["seed"]: run for run in report["runs"] if run["side"] == side} for side in ("full", "ours")}
    yield f"Recipe `{report['settings']['recipe']}`, {len(seeds)} seeds, both sides interleaved in one run:\n"
    yield from rows(
        ["seed", "test accuracy, full", "ours", "training, full", "ours", "speed-up", "frost line (step: depth)"],
        (
            [
                seed,
                *(f"{found['accuracy'][side][index]:.1f}" for side in sides),
                *(f"{sides[side][seed]['train_seconds']:.0f} s" for side in sides),
                f"{speed['per_seed'][index]:.2f}x",
                ", ".join(f"{move['step']}: {move['depth']}" for move in sides["ours"][seed]["trajectory"]),
            ]
            for index, seed in enumerate(seeds)
        ),
    )
    yield ""
    yield (
        f"Training {speed['median']:.2f}x faster (median; {speed['min']:.2f} to {speed['max']:.2f}), end to end "
        f"{found['total_speedup']['median']:.2f}x. Mean accuracy loss {loss['mean']:+.2f} points, 95 % interval "
        f"{low:+.2f} to {high:+.2f} (bootstrap over items and seeds). Gradient statistics and decisions: "
        f"{_overhead(sides['ours'].values()):.2%} of training time."
    )
    yield ""
    yield machine({"device": "cpu", **report})


def _overhead(runs: Iterable[dict[str, Any]]) -> float:
    """Share of training time that went into measuring and deciding, over all runs."""
    seconds = [(run["seconds"]["statistics"] + run["seconds"]["decide"], run["train_seconds"]) for run in runs]
    return sum(spent for spent, _ in seconds) / sum(whole for _, whole in seconds)


def cache(report: dict[str, Any]) -> Iterable[str]:
    """What ``cache.py`` measured."""
    for shape in report["shapes"]:
        batch, rounds = _batch(shape["batch"]), shape["rounds"]
        tiers = {"device": "from the GPU's memory", "memory": "from host memory", "disk": "from a cold disk"}
        tier = tiers[report["tier"]]
        yield f"A fully cached step of {report['model']} {tier}, by depth, {batch}, median of {rounds} rounds:\n"
        yield from rows(
            ["depth", "cached, ms", "truncated model, ms", "ratio", "95 % interval", "faster than uncached"],
            (
                [
                    row["depth"],
                    *(f"{1000 * row['seconds'][name]['median']:.1f}" for name in ("cached", "truncated")),
                    *interval(row["ratio"]),
                    f"{row['speedup_over_uncached']['median']:.2f}x",
                ]
                for row in shape["depths"]
            ),
        )
        yield ""
    yield machine(report)


def disk(report: dict[str, Any]) -> Iterable[str]:
    """What ``disk.py`` measured."""
    yield "Reading batches of 32 records from disk, checksums on, against raw positional reads of as many bytes:\n"
    yield from rows(
        ["record, KB", "cold, MB/s", "raw, MB/s", "ratio", "warm, MB/s", "raw, MB/s", "ratio"],
        (
            [
                f"{size['bytes'] / 1e3:.0f}",
                *(
                    cell
                    for kind in ("cold", "warm")
                    for cell in (
                        *(f"{size[kind][f'{side}_bytes_per_second'] / 1e6:.0f}" for side in ("store", "raw")),
                        f"{size[kind]['ratio']:.2f}",
                    )
                ),
            ]
            for size in report["sizes"]
        ),
    )
    yield ""
    yield machine(report)


def ways(report: dict[str, Any]) -> Iterable[str]:
    """What ``ways.py`` measured."""
    yield f"With a cache against without, same seed and trajectory (`{report['command']}`):\n"
    yield from rows(
        ["way", "training faster", "computed", "upgraded", "read", "validation items apart, each epoch", "of test"],
        (
            [
                {"ours": "ours", "latching": "depth taken at epoch start", "anew": "no upgrades"}[way],
                f"{found['speedup_over_uncached']['median']:.2f}x",
                *(
                    f"{sum(found['samples'][name]) / len(found['samples'][name]):,.0f}"
                    for name in ("misses", "upgrades", "hits")
                ),
                "; ".join(", ".join(str(items) for items in run) for run in found["items_apart_per_epoch"]),
                ", ".join(str(items) for items in found["test_items_apart"]),
            ]
            for way, found in report["comparison"].items()
        ),
    )
    yield ""
    yield machine({"device": "cpu", **report})


def forecast(report: dict[str, Any]) -> Iterable[str]:
    """What ``forecast.py`` found."""
    yield f"Training time of {report['recipe']} with policy static, predicted from measured steps, and measured:\n"
    yield from rows(
        ["processes", "depth", "cache", "predicted", "measured", "error"],
        (
            [
                side["ranks"],
                run["depth"],
                run["cache"],
                *(f"{run[name]:.1f} s" for name in ("predicted", "seconds")),
                f"{run['error']:+.1%}",
            ]
            for side in report["sides"]
            for run in side["runs"]
        ),
    )
    yield ""
    yield machine(report)


# By what a file's name begins with.
TABLES: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
    "accuracy": accuracy,
    "budgets": budgets,
    "cache": cache,
    "disk": disk,
    "distributed": distributed,
    "drift": drift,
    "forecast": forecast,
    "gradients": gradients,
    "interlayer": interlayer,
    "memory": memory,
    "memory_time": memory_time,
    "packing": packing,
    "resting": resting,
    "step_time": step_time,
    "ways": ways,
}


def _batch(batch: dict[str, Any]) -> str:
    return f"{batch['rows']} x {batch['length']} tokens ({batch['data']})"


def _times(row: dict[str, Any]) -> list[str]:
    return [f"{1000 * row['seconds'][name]['median']:.1f}" for name in ("frostline", "bound")]


if __name__ == "__main__":
    main()
