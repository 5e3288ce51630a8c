"""What a simulation says, as tables of text: the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from frostline.simulator.model import SIDES, Simulation
from frostline.simulator.published import Check, check, setup

__all__ = ["LABELS", "Scaling", "Table", "duration", "money", "published_tables", "scaling_tables", "stage_table"]

Scaling = Mapping[int, Mapping[str, Simulation]]
"""By number of ranks, by side (:data:`frostline.simulator.model.SIDES`)."""

LABELS = dict(zip(SIDES, ("nothing frozen", "no packing", "performance", "efficiency"), strict=True))


@dataclass(frozen=True)
class Table:
    """Every cell is text; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def scaling_tables(scaling: Scaling) -> list[Table]:
    """Steps and epochs, whole runs, and what they cost, by number of ranks."""
    steps, times, costs = [], [], []
    for ranks, sides in scaling.items():
        full, frozen = sides["full"], [sides[side] for side in SIDES[1:]]
        first = duration(full.stages[0].step_seconds), duration(full.epoch_seconds[0])
        steps.append((f"{ranks:,}", *first, *(duration(side.epoch_seconds[-1]) for side in frozen)))
        times.append(
            (
                f"{ranks:,}",
                duration(full.seconds),
                *(f"{duration(side.seconds)}, {full.seconds / side.seconds:.2f}x" for side in frozen),
            )
        )
        costs.append(
            (
                f"{ranks:,}",
                money(full.cost),
                *(f"{money(side.cost)}, {full.cost / side.cost:.2f}x" for side in frozen),
            )
        )
    packings = tuple(LABELS[side] for side in SIDES[1:])
    return [
        Table(
            "A step and an epoch with nothing frozen; the last epoch with freezing",
            ("ranks", "step", "epoch", *packings),
            tuple(steps),
        ),
        Table("Time of the run, and how many times faster", ("ranks", LABELS["full"], *packings), tuple(times)),
        Table("Cost of the run, and how many times cheaper", ("ranks", LABELS["full"], *packings), tuple(costs)),
    ]


def stage_table(sides: Mapping[str, Simulation]) -> Table:
    """Every stage of a run on one number of ranks."""
    rows = [
        (
            LABELS[side],
            f"{stage.start:,}",
            str(stage.depth),
            f"{stage.batch:,}",
            f"{stage.ranks:,}",
            f"{stage.steps:,}",
            duration(stage.step_seconds),
            duration(stage.seconds),
        )
        for side, simulation in sides.items()
        for stage in simulation.stages
    ]
    columns = ("packing", "from", "depth", "batch", "ranks", "steps", "step", "time")
    return Table("Stages, from which sample on (the time begins with the restart)", columns, tuple(rows))


def published_tables(found: Check) -> list[Table]:
    """The fit, the predictions beside what was published, and what other assumptions would predict."""
    times = found.setup.iteration_seconds
    fitted = (
        ("a block's forward pass, one sample", f"{1000 * found.unit_seconds:.3f} ms", f"{times.one:g} s on 1 rank"),
        (
            "effective bandwidth of the ring",
            f"{found.bytes_per_second / 1e6:.1f} MB/s",
            f"{times.all:g} s on {found.setup.ranks} ranks",
        ),
    )
    claims = tuple(
        (claim.what, f"{claim.predicted:.2f}x", f"{claim.published:.2f}x", f"{claim.error:+.0%}")
        for claim in found.claims
    )
    others = []
    for alternative in found.setup.alternatives:
        time, cost, _ = check(setup(alternative.change)).claims
        others.append((alternative.what, f"{time.predicted:.2f}x", f"{cost.predicted:.2f}x"))
    return [
        Table("Fitted to the iteration times alone", ("parameter", "value", "fitted to"), fitted),
        Table("Predicted, and published", ("claim", "predicted", "published", "error"), claims),
        Table("Other assumptions, one at a time (not used)", ("assumption", "time", "cost"), tuple(others)),
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 0.9995:  # what rounds to 1000 ms is a second
        return f"{1000 * seconds:.3g} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (259_200, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} d"


def money(value: float) -> str:
    """A sum in whatever a price is in."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
