"""The tables of compression and of layers that take turns: memory, time, budgets, accuracy, gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import interval, machine, rows

__all__ = ["SORTS", "budgets", "drift", "gradients", "interlayer", "memory", "memory_time", "resting"]

# Of layers: weights of ``nn.Linear`` and convolutions, embeddings, normalisations.
SORTS = ("matrices", "tables", "norms")


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
    last = list(tasks.values())[-1]
    kinds = last["settings"].get("within") == "kind"
    ranked = "a share of each kind of layers" if kinds else "a share of all layers, as published,"
    rests = f"{ranked} rests at each step" if last["shares"]["ours"] else "nothing rests"
    yield f"SlimFit ({rests}, activations compressed) against full fine-tuning:\n"
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
    counts = sorted({len(t["comparison"]["loss_points"]["per_seed"]) for t in tasks.values() if t.get("comparison")})
    seeds = " or ".join(str(count) for count in counts)
    yield (
        f"Pooled over {len(pooled['tasks'])} tasks, {seeds} seeds each: {pooled['mean']:+.2f} points, 95 % interval "
        f"{low:+.2f} to {high:+.2f} (bootstrap over items and seeds)."
    )
    yield ""
    rate = last["settings"].get("rate")
    asked = "" if last["settings"]["tuning"] and not rate else f" --share {last['shares']['ours']:g}"
    asked += " --within kind" * kinds + f" --rate {rate}" * bool(rate)
    yield machine({**last, "command": f"python benchmarks/interlayer.py{asked}"})


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
            [name, kept, *(f"{row[which][part]:.4f}" for part in parts)]
            for level, row in report["levels"].items()
            for name, which, kept in (
                (level, "cosines", f"{row['smaller']:.1f}x less"),
                (f"{level}, norms at rest", "resting", "-"),
            )
        ),
    )
    yield ""
    yield machine(report)


def resting(report: dict[str, Any]) -> Iterable[str]:
    """What ``resting.py`` counted."""
    yield f"Which layers train under policy `interlayer`, and what is skipped ({report['steps']} steps of training):\n"
    yield from rows(
        ["recipe", "share at rest", "ranked within", *(f"{sort} train" for sort in SORTS), "weight gradients skipped"],
        (
            [
                name,
                f"{way['share']:g}",
                way["within"],
                *(
                    f"{100 * way['trained'][sort]['of_steps']:.0f} %" if sort in way["trained"] else "-"
                    for sort in SORTS
                ),
                f"{100 * way['skipped']:.0f} %",
            ]
            for name, ways in report["models"].items()
            for way in ways
        ),
    )
    yield ""
    yield machine(report)
