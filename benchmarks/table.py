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


def memory(report: dict[str, Any]) -> Iterable[str]:
    """What ``memory.py`` measured of memory."""
    modes = {mode["mode"]: mode for mode in report["modes"]}
    size = f"{report['rows']} x {report['length']} tokens" if report["length"] else f"{report['rows']} images"
    plain = modes.get("full, eager attention") or modes["full"]
    yield f"Memory of a training step, {report['shape']}-base, {size}, {_precision(report)}, AdamW, MB:\n"
    yield from rows(
        ["way", "saved for backward", "smaller", "usual turn", "peak of the step", "smaller", "usual turn", "resident"],
        (
            [
                name,
                f"{mode['saved'] / 1e6:,.0f}",
                f"{plain['saved'] / mode['saved']:.1f}x",
                f"{mode['usual_saved'] / 1e6:,.0f}" if mode.get("usual_saved") else "-",
                f"{mode['peak'] / 1e6:,.0f}",
                f"{plain['peak'] / mode['peak']:.2f}x",
                f"{mode['usual'] / 1e6:,.0f}" if mode["usual"] else "-",
                f"{mode['resident'] / 1e6:,.0f}",
            ]
            for name, mode in modes.items()
        ),
    )
    yield ""
    yield machine(report)


def memory_time(report: dict[str, Any]) -> Iterable[str]:
    """What ``memory.py`` measured of time."""
    size = f"{report['rows']} x {report['length']} tokens" if report["length"] else f"{report['rows']} images"
    of = f"{report['shape']}-base, {size}, {_precision(report)}"
    yield f"A step with compression against the same step without, {of}:\n"
    yield from rows(
        ["way", "level", "without, s", "with, s", "ratio", "95 % interval"],
        (
            [
                row["mode"],
                row["level"],
                *(f"{row['seconds'][level]['median']:.3g}" for level in ("off", row["level"])),
                *interval(row["ratio"]),
            ]
            for row in report["modes"]
        ),
    )
    yield ""
    yield machine(report)


def _precision(report: dict[str, Any]) -> str:
    return "autocast to bfloat16" if report.get("autocast") else "fp32"


def budgets(report: dict[str, Any]) -> Iterable[str]:
    """What ``budgets.py`` measured."""
    size = f"{report['rows']} x {report['length']} tokens" if report["length"] else f"{report['rows']} images"
    yield f"Ways to train {report['shape']}-base with batches of {size}, fp32, AdamW:\n"
    yield from rows(
        ["way", "peak of a step, MB", "records, KB a sample", "time against full"],
        (
            [
                way["mode"],
                f"{way['peak'] / 1e6:,.0f}",
                f"{way['cached'] / 1e3:,.0f}" if way["cached"] else "-",
                f"{way['time']['median']:.2f}",
            ]
            for way in report["modes"]
        ),
    )
    yield ""
    yield "The fastest way of each kind that fits into a budget, and its time against full fine-tuning without one:\n"
    kinds = [kind for kind in report["best"][0] if kind != "budget"]
    yield from rows(
        ["budget", *kinds],
        (
            [
                f"{row['budget'] / 2**30:.2f} GiB",
                *(
                    f"{row[kind]['time']:.2f} ({_by_what(row[kind]['way'], kind)})" if row[kind] else "-"
                    for kind in kinds
                ),
            ]
            for row in report["best"]
        ),
    )
    yield ""
    yield machine(report)


def _by_what(way: str, kind: str) -> str:
    """What a way adds to its kind."""
    return way.removeprefix(kind).lstrip(" +,") or "as it is"


def interlayer(report: dict[str, Any]) -> Iterable[str]:
    """What ``interlayer.py`` measured."""
    tasks, pooled = report["tasks"], report["pooled"]
    yield "SlimFit (layers rest at each step, activations compressed) against full fine-tuning:\n"
    yield from rows(
        [
            "task",
            "learning rate, full",
            "SlimFit",
            "share at rest",
            "test accuracy, full",
            "SlimFit",
            "loss, points",
            "95 % interval",
        ],
        (
            [
                name,
                *(f"{task['rates'][side]:g}{' (end)' * task['at_the_end'][side]}" for side in ("full", "ours")),
                f"{task['shares']['ours']:g}",
                *(
                    f"{sum(accuracies) / len(accuracies):.1f}"
                    for accuracies in (task["comparison"]["accuracy"][side] for side in ("full", "ours"))
                ),
                f"{task['comparison']['loss_points']['mean']:+.2f}",
                " to ".join(f"{value:+.2f}" for value in task["comparison"]["loss_points"]["interval_95"]),
            ]
            for name, task in tasks.items()
            if task.get("comparison")
        ),
    )
    yield ""
    if not pooled:
        return
    low, high = pooled["interval_95"]
    seeds = min(len(task["comparison"]["loss_points"]["per_seed"]) for task in tasks.values() if task.get("comparison"))
    yield (
        f"Pooled over {len(pooled['tasks'])} tasks, {seeds} seeds each: {pooled['mean']:+.2f} points, 95 % interval "
        f"{low:+.2f} to {high:+.2f} (bootstrap over items and seeds)."
    )
    yield ""
    last = list(tasks.values())[-1]
    share = "" if last["settings"]["tuning"] else f" --share {last['shares']['ours']:g}"
    yield machine({**last, "command": f"python benchmarks/interlayer.py{share}"})


def drift(report: dict[str, Any]) -> Iterable[str]:
    """What ``drift.py`` measured."""
    settings = report["settings"]
    yield f"{settings['steps']} steps of {settings['recipe']} at each level, against exact ones:\n"
    yield from rows(
        [
            "level",
            "validation loss",
            "from exact",
            "distance",
            "test accuracy, %",
            "from exact",
            "distance",
            "two seeds",
        ],
        (
            [
                level,
                f"{row['loss']['mean']:.4f}",
                f"{row['loss']['apart']:+.4f}",
                f"{row['loss']['distance']:.4f}",
                f"{100 * row['accuracy']['mean']:.2f}",
                f"{100 * row['accuracy']['apart']:+.2f}",
                f"{100 * row['accuracy']['distance']:.2f}",
                f"{row['loss']['spread']:.4f}; {100 * row['accuracy']['spread']:.2f}",
            ]
            for level, row in report["levels"].items()
        ),
    )
    yield ""
    yield machine(report)


def gradients(report: dict[str, Any]) -> Iterable[str]:
    """What ``gradients.py`` measured."""
    yield (
        f"Compressed gradients against exact ones, {report['model']} after {report['steps']} steps on "
        f"{report['recipe']}, least cosine over {report['batches']} batches:\n"
    )
    parts = list(next(iter(report["levels"].values()))["cosines"])
    yield from rows(
        ["level", "kept for backward", *parts],
        (
            [level, f"{row['smaller']:.1f}x less", *(f"{row['cosines'][part]:.4f}" for part in parts)]
            for level, row in report["levels"].items()
        ),
    )
    yield ""
    yield machine(report)


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
    "step_time": step_time,
    "ways": ways,
}


def _batch(batch: dict[str, Any]) -> str:
    return f"{batch['rows']} x {batch['length']} tokens ({batch['data']})"


def _times(row: dict[str, Any]) -> list[str]:
    return [f"{1000 * row['seconds'][name]['median']:.1f}" for name in ("frostline", "bound")]


if __name__ == "__main__":
    main()
