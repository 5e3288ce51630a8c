"""The part of a report that says how a launched run was packed: its stages, and what they took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from frostline.packing import Entry, Stages, account, cost_of
from frostline.report.pages import Numbers, Section
from frostline.report.run import Run

__all__ = ["price_of", "stages_section"]


def price_of(run: Run) -> float | None:
    """Of one rank for one hour, as the run's recipe says."""
    price: float | None = (run.recipe.get("pack") or {}).get("price")
    return price


def stages_section(run: Run) -> Iterable[Section]:
    """Nothing where the run was not launched."""
    stages, entries = Stages.read(run.path), account(run.path)
    if stages is None:
        return
    price, first = price_of(run), stages.stages[0]
    hours, seconds = sum(entry.rank_hours for entry in entries), sum(entry.seconds for entry in entries)
    text = f"{hours:.4g} rank-hours in {seconds:,.1f} s"
    if price is not None:
        text += f", which cost {cost_of(entries, price):.4g}"
    if len(stages.stages) > 1 and seconds:
        text += (
            f"; on {first.ranks} ranks to the end the same time would be {first.ranks * seconds / 3600:.4g} rank-hours"
        )
    yield Section("stages", "Stages", f"{text}.", None, [_taken(stages, entries, price), *_looks(stages)])


def _taken(stages: Stages, entries: list[Entry], price: float | None) -> Numbers:
    heads = ("stage", "from sample", "depth", "ranks", "micro-batch", "micro-batches", "batch", "rate", "seconds")
    rows = []
    for stage in stages.stages:
        own = [entry for entry in entries if entry.stage == stage.number]
        took = [f"{sum(entry.seconds for entry in own):,.1f}", f"{sum(entry.rank_hours for entry in own):.4f}"]
        if price is not None:
            took.append(f"{cost_of(own, price):.4g}")
        counts = (stage.depth, stage.ranks, stage.rows, stage.accumulation, stage.batch)
        rows.append((str(stage.number), f"{stage.samples:,}", *map(str, counts), f"{stage.rate:.3g}", *took))
    return Numbers("Stages", (*heads, "rank-hours", *(["cost"] if price is not None else [])), rows)


def _looks(stages: Stages) -> Iterable[Numbers]:
    """What was found each time that the frost line had moved."""
    if not stages.looks:
        return
    heads = ("sample", "depth", "ranks", "batch", "MiB, as it is", "MiB, next", "MiB allowed", "left, as it is")
    rows = []
    for look in stages.looks:
        found = look.numbers
        cells = [f"{found[name] / 2**20:,.1f}" for name in ("peak_before", "peak", "cap")]
        cells += [_left(found, "_before"), _left(found, ""), f"{found['restart_seconds']:,.1f}"]
        taken = "begins" if look.stage is not None else "not taken"
        rows.append((f"{look.samples:,}", str(look.depth), str(found["ranks"]), str(found["batch"]), *cells, taken))
    yield Numbers(
        "Looks at the next stage (what is left, and starting it: seconds of time, or of all ranks together)",
        (*heads, "left, next", "start", "outcome"),
        rows,
    )


def _left(found: Any, which: str) -> str:
    """Predicted seconds for what is left of the run."""
    name = f"seconds{which}" if f"seconds{which}" in found else f"rank_seconds{which}"
    return f"{found[name]:,.1f}"
