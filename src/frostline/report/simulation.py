"""The curves of ``frostline simulate`` as a self-contained page: time and cost over ranks, and the numbers behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from frostline.report.pages import put_in_place, templates
from frostline.simulator.model import SIDES, Simulation
from frostline.simulator.tables import LABELS, Scaling, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from frostline.report.plots import Plot

__all__ = ["write_simulation"]


def write_simulation(path: Path, title: str, scaling: Scaling, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Write the page.

    Raises:
        FrostlineError: the extra ``report`` is not installed, or ``path`` cannot be written.
    """
    environment = templates("the curves need")
    plots = [
        _curves("hours", "hours of a run", scaling, lambda side: side.seconds / 3600),
        _curves("cost", "cost of a run", scaling, lambda side: side.cost),
        _curves("step", "seconds a step, last stage", scaling, lambda side: side.stages[-1].step_seconds),
    ]
    page = environment.get_template("simulation.html.j2").render(title=title, notes=notes, plots=plots, tables=tables)
    put_in_place(page, path)


def _curves(name: str, unit: str, scaling: Scaling, value: Callable[[Simulation], float]) -> Plot:
    """One line for each side over the number of ranks, both axes logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    from frostline.report.plots import BASELINE, BOUND, MUTED, RUN, draw_plot

    ranks = list(scaling)
    series = {side: [value(sides[side]) for sides in scaling.values()] for side in SIDES}
    looks = dict(zip(SIDES, ((MUTED, "--"), (BASELINE, "-"), (RUN, "-"), (BOUND, "-")), strict=True))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for side, values in series.items():
            colour, style = looks[side]
            axes.plot(ranks, values, style, color=colour, linewidth=1.6, marker="o", markersize=3, label=LABELS[side])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        # A phone has room for half of eleven numbers.
        shown = ranks[::2] if narrow and len(ranks) > 6 else ranks
        axes.xaxis.set_major_locator(FixedLocator([float(count) for count in shown]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.4g}"))
        axes.set_xlabel("ranks at the start")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2 if narrow else len(SIDES))

    said = "; ".join(
        f"{LABELS[side]} from {values[0]:.4g} on {ranks[0]:,} to {values[-1]:.4g} on {ranks[-1]:,}"
        for side, values in series.items()
    )
    return draw_plot(name, f"{unit.capitalize()} by number of ranks: {said}.", 3.2, draw)
