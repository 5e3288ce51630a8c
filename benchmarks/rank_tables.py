"""The tables of runs on several ranks: what ``distributed.py`` measured, part by part, and ``packing.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.accuracy import paired
from benchmarks.markdown import interval, machine, rows, word

__all__ = ["distributed", "packing"]


def distributed(report: dict[str, Any]) -> Iterable[str]:
    """What ``distributed.py`` measured."""
    for name, part in report["parts"].items():
        yield from _PARTS[name](part, f"Recipe `{report['settings']['recipe']}`, {report['batch']} samples a step")
        yield ""
        yield machine(part)
        yield ""


def packing(report: dict[str, Any]) -> Iterable[str]:
    """What ``packing.py`` measured."""
    settings, found = report["settings"], report["comparison"]
    seeds, sides = paired(report["runs"])
    mode = sides["ours"][0]["mode"]
    said = dict(change.split("=", 1) for change in settings["overrides"])  # the last word on a setting counts
    changes = ", ".join(f"`{name}={value}`" for name, value in said.items())
    where = f"Recipe `{settings['recipe']}` ({changes}) on {settings['ranks']} ranks"
    yield f"{where}, without packing over {mode} packing:\n"
    names = {"cpu_seconds": "CPU-seconds", "rank_seconds": "rank-seconds", "seconds": "time", "steps": "steps"}
    yield from rows(
        ["seed", *names.values(), "steps, without and with", "test accuracy, without", "with", "ranks x rows (sample)"],
        (
            [
                seed,
                *(f"{found['ratios'][name]['per_seed'][index]:.2f}x" for name in names),
                f"{sides['full'][index]['steps']}, {sides['ours'][index]['steps']}",
                *(f"{found['accuracy'][side][index]:.1f}" for side in sides),
                ", ".join(f"{s['ranks']} x {s['rows']} ({s['samples']})" for s in sides["ours"][index]["stages"]),
            ]
            for index, seed in enumerate(seeds)
        ),
    )
    loss = found["loss_points"]
    low, high = loss["interval_95"]
    medians = ", ".join(f"{what} {found['ratios'][name]['median']:.2f}x" for name, what in names.items())
    yield ""
    yield f"Medians: {medians}. Accuracy lost: {loss['mean']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}."
    yield ""
    yield machine(report)


def _agreement(part: dict[str, Any], what: str) -> Iterable[str]:
    yield f"{what}, {part['steps']} steps, no dropout; teacher-forced: against one rank with the same weights:\n"
    yield from rows(
        [
            "policy",
            "ranks",
            "same decisions",
            "same weights",
            "moves of one rank",
            "loss apart, teacher-forced",
            "free-running",
            "CPU-seconds",
            "frost line (step: depth)",
        ],
        (
            [
                run["policy"],
                run["ranks"],
                *(word(run[key]) for key in ("same_decisions", "same_weights", "moves_of_one_rank")),
                f"{run['teacher_forced']:.1e}",
                f"{run['free_running']:.1e}",
                f"{sum(run['cpu_seconds']):.0f}",
                ", ".join(f"{step}: {depth}" for step, depth in run["moves"]),
            ]
            for run in part["runs"]
        ),
    )


def _bytes(part: dict[str, Any], what: str) -> Iterable[str]:
    yield f"{what}, MB that DDP hands out at a step, counted in a communication hook:\n"
    yield from rows(
        ["arguments", "ranks", "depth", "trains", "sent, least", "sent, most", "apart"],
        (
            [
                run["arguments"],
                run["ranks"],
                row["depth"],
                *(f"{nbytes / 1e6:.2f}" for nbytes in (row["active"], *row["sent"])),
                f"{row['apart']:.2%}",
            ]
            for run in part["runs"]
            for row in run["depths"]
        ),
    )


def _time(part: dict[str, Any], what: str) -> Iterable[str]:
    yield f"{what}, median of {part['rounds']} rounds, a thread a rank:\n"
    sides = list(part["second_rank_speedup"])
    yield from rows(
        ["ranks", *(f"{side}, ms" for side in sides), "full / half frozen", "95 % interval"],
        (
            [
                run["ranks"],
                *(f"{1000 * run['seconds'][side]['median']:.1f}" for side in sides),
                *interval(run["frozen_speedup"]),
            ]
            for run in part["runs"]
        ),
    )
    yield ""
    yield from rows(
        ["side", "one rank / two", "95 % interval"],
        ([side, *interval(ratio)] for side, ratio in part["second_rank_speedup"].items()),
    )


_PARTS: dict[str, Callable[[dict[str, Any], str], Iterable[str]]] = {
    "agreement": _agreement,
    "bytes": _bytes,
    "time": _time,
}
