"""The plots of a report, as inline SVG that follows the page's light or dark colours.

matplotlib writes colours as CSS inside the SVG. Each theme colour is drawn as a reserved hex value and replaced
by a CSS variable of the page afterwards. Every plot is drawn twice, for a desktop and for a phone: one drawing
scaled down to a phone has letters too small to read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from frostline.events import PHASES
from frostline.report.run import Run, as_number, results

__all__ = [
    "Plot",
    "decision_plot",
    "draw_plot",
    "evaluation_plot",
    "loss_plot",
    "step_plot",
    "time_plot",
    "trajectory_plot",
]

# Reserved colours -> CSS variables of templates/report.html.j2.
_THEME = {
    "#0a0101": "--ink",
    "#0a0102": "--muted",
    "#0a0103": "--grid",
    "#0a0104": "--run",
    "#0a0105": "--baseline",
    "#0a0106": "--frozen",
    "#0a0107": "--neutral",
    "#0a0108": "--bound",
    "#0a0111": "--phase-train",
    "#0a0112": "--phase-statistics",
    "#0a0113": "--phase-decide",
    "#0a0114": "--phase-evaluate",
    "#0a0115": "--phase-save",
    "#0a0116": "--phase-other",
}
_COLOUR = {variable: value for value, variable in _THEME.items()}
INK, MUTED, GRID, RUN, BASELINE, FROZEN, NEUTRAL, BOUND = (
    _COLOUR[f"--{name}"] for name in ("ink", "muted", "grid", "run", "baseline", "frozen", "neutral", "bound")
)

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from the user: "$" is a letter
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}

_WIDTH = {"wide": 7.6, "narrow": 3.6}  # inches: a column of text, and a phone


@dataclass(frozen=True)
class Plot:
    """One plot: inline SVG for a desktop (``wide``) and for a phone (``narrow``), and the same said in words."""

    alt: str
    wide: str
    narrow: str


Draw = Callable[[Figure, bool], None]


def draw_plot(name: str, alt: str, height: float, draw: Draw) -> Plot:
    """Draw at both widths; ``height`` is in inches, ``draw`` is told whether the figure is narrow."""
    drawn = {}
    for size, width in _WIDTH.items():
        key = f"{name}-{size}"
        # The salt keeps the ids of clip paths and markers apart when many SVGs share one page.
        with rc_context({**_STYLE, "svg.hashsalt": key}):
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, size == "narrow")
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        drawn[size] = _inline(file.getvalue(), key)
    return Plot(alt, drawn["wide"], drawn["narrow"])


def _inline(svg: str, key: str) -> str:
    """Make matplotlib's SVG file a part of a page: unique ids, theme colours, no fixed size, hidden from readers.

    The figure around it carries the alternative text, so that it is read once and not twice.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'((?:xlink:)?href=")#', rf"\1#{key}-", svg)
    svg = svg.replace("url(#", f"url(#{key}-")
    for value, variable in _THEME.items():
        svg = svg.replace(value, f"var({variable})")
    svg = re.sub(r"<svg ([^>]*?)>", _root, svg, count=1, flags=re.DOTALL)
    return svg.strip()


def _root(match: re.Match[str]) -> str:
    attributes = re.sub(r'\b(?:width|height|version)="[^"]*"', "", match.group(1))
    return f'<svg {" ".join(attributes.split())} aria-hidden="true" focusable="false">'


def _samples_axis(axes: Axes, run: Run, narrow: bool) -> None:
    axes.set_xlabel("samples seen")
    axes.set_xlim(0, max(run.samples, 1))
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    per_epoch = run.plan.get("samples_per_epoch")
    if per_epoch and run.samples / per_epoch <= 40:
        for epoch in range(1, math.ceil(run.samples / per_epoch)):
            axes.axvline(epoch * per_epoch, color=GRID, linewidth=1, zorder=0)


def trajectory_plot(run: Run) -> Plot:
    """Depth over samples seen, as steps; the area below the frost line is what no longer trains."""
    points = run.trajectory
    samples = [point.samples for point in points] + [run.samples]
    depths = [point.depth for point in points] + [points[-1].depth]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        axes.fill_between(samples, depths, step="post", color=FROZEN, alpha=0.6, linewidth=0)
        axes.step(samples, depths, where="post", color=RUN, linewidth=2)
        axes.set_ylim(-0.08, max(run.blocks, max(depths) + 1))  # a line at depth 0 stays whole
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_ylabel("depth (blocks frozen)")
        _samples_axis(axes, run, narrow)

    alt = f"Depth over samples seen: {', '.join(f'{p.depth} from sample {p.samples:,}' for p in points)}."
    return draw_plot("trajectory", alt, 2.8, draw)


def decision_cells(run: Run) -> tuple[np.ndarray, np.ndarray, bool]:
    """What the decisions rest on, as a grid ``[blocks, decisions]``.

    The first array holds log2(change / threshold), or log10 of the score where the policy explains no changes
    (then the flag is False); NaN where there is no such number. The second holds 0 for a block that trained up to
    the decision, 1 for one below the frost line by then, 2 for one that the decision rests.
    """
    decisions = run.decisions
    relative = any(entry["explanation"].get("changes") for entry in decisions)
    values = np.full((run.blocks, len(decisions)), np.nan)
    states = np.zeros((run.blocks, len(decisions)), dtype=int)
    paths = list(run.plan.get("block_paths") or ())
    for column, entry in enumerate(decisions):
        states[: int(entry["depth_before"]), column] = 1
        for path in entry.get("resting") or ():
            if path in paths:
                states[paths.index(path), column] = 2
        numbers = entry["explanation"].get("changes") if relative else entry["observation"].get("scores")
        threshold = as_number(entry["explanation"].get("threshold")) if relative else 1.0
        for block, number in (numbers or {}).items():
            value = as_number(number)
            if value is not None and threshold and 0 <= int(block) < run.blocks:
                values[int(block), column] = _log(value / threshold, 2 if relative else 10)
    return values, states, relative


def _log(value: float, base: int) -> float:
    if math.isnan(value):
        return math.nan
    if value <= 0:
        return -math.inf
    return math.inf if math.isinf(value) else math.log(value, base)


def _colour_limit(values: np.ndarray) -> int:
    """Where the colours of log2(change / threshold) end: 1, 2 or 3 to either side, as far as the numbers go."""
    finite = np.abs(values[np.isfinite(values)])
    return int(np.clip(np.ceil(finite.max()), 1, 3)) if finite.size else 3


def decision_plot(run: Run) -> Plot | None:
    """A heat map of the numbers behind every decision; ``None`` for a run without decisions."""
    if not run.decisions or not run.blocks:
        return None
    values, states, relative = decision_cells(run)
    resting = bool((states == 2).any())

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        blocks, count = values.shape
        axes.set_facecolor(NEUTRAL)
        # Decisions count from 1; a cell is centred on its decision and its block.
        edges = (np.arange(count + 1) + 0.5, np.arange(blocks + 1) - 0.5)
        # One vector rectangle per cell is crisp up to a few thousand; beyond that a bitmap is smaller. The edges
        # keep a browser from showing hairlines between cells.
        cell: dict[str, Any] = {"rasterized": values.size > 4000, "edgecolors": "face", "linewidth": 0.4}
        limit = _colour_limit(values)
        shown = np.ma.masked_where(np.isnan(values), np.clip(values, -limit, limit) if relative else values)
        if shown.count():
            style: dict[str, Any] = {"cmap": "viridis"}
            if relative:
                style = {"cmap": "RdBu_r", "norm": TwoSlopeNorm(0.0, -limit, limit)}
            mesh = axes.pcolormesh(*edges, shown, **style, **cell)
            bar = figure.colorbar(mesh, ax=axes, location="top" if narrow else "right", pad=0.02, aspect=25)
            bar.outline.set_visible(False)
            if relative:
                ticks = range(-limit, limit + 1)
                bar.set_ticks(ticks, labels=[f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])
            bar.set_label("change / threshold" if relative else "score, log10")
        if (states == 1).any():
            mask = np.ma.masked_where(states != 1, states)
            axes.pcolormesh(*edges, mask, cmap=ListedColormap([FROZEN]), **cell)
        if resting:
            mask = np.ma.masked_where(states != 2, states)
            axes.pcolor(*edges, mask, cmap=ListedColormap([GRID]), hatch="////", edgecolor=MUTED, linewidth=0)
        depths = np.array([int(entry["depth"]) for entry in run.decisions])
        axes.stairs(depths - 0.5, edges[0], baseline=None, color=INK, linewidth=2)
        axes.set_xlim(0.5, count + 0.5)
        axes.set_ylim(-0.6, blocks - 0.5)
        axes.set_xlabel("decision")
        axes.set_ylabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(6 if narrow else 12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(min(blocks + 2, 12), integer=True))

    what = "relative change of each block against the threshold" if relative else "score of each block"
    alt = f"Heat map over {len(run.decisions)} decisions and {run.blocks} blocks: {what}; block 0 is nearest the input"
    alt += "; hatched cells rest." if resting else "."
    return draw_plot("decisions", alt, 2.2 + min(run.blocks, 48) * 0.11, draw)


def _sides(run: Run) -> list[tuple[str, Run, str]]:
    """What is drawn: the run, and its baseline where there is one; each with its colour."""
    # A third party's policy may have a name that leaves no room for the plot.
    sides = [(run.policy[:24], run, RUN)]
    if run.baseline is not None:
        sides.append(("baseline", run.baseline, BASELINE))
    return sides


def _lines(
    name: str, run: Run, unit: str, values: Callable[[Run], Sequence[tuple[int, float]]], *, marker: str | None
) -> Plot | None:
    """A line over samples for each side; ``None`` where neither side has a value."""
    series = [(label, values(side), colour) for label, side, colour in _sides(run)]
    series = [entry for entry in series if entry[1]]
    if not series:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for label, points, colour in series:
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=1.6, marker=marker, ms=4, label=label, clip_on=False
            )
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        _samples_axis(axes, run, narrow)
        if len(series) > 1:
            axes.legend()

    said = "; ".join(
        f"{label} from {points[0][1]:.4g} at sample {points[0][0]:,} to {points[-1][1]:.4g} at sample {points[-1][0]:,}"
        for label, points, _ in series
    )
    return draw_plot(name, f"{unit.capitalize()} over samples seen: {said}.", 2.6, draw)


def loss_plot(run: Run) -> Plot | None:
    """Training loss over samples, both sides."""

    def values(side: Run) -> list[tuple[int, float]]:
        pairs = ((entry["samples"], as_number(entry.get("loss"))) for entry in side.select("loss"))
        return [(samples, loss) for samples, loss in pairs if loss is not None]

    return _lines("loss", run, "training loss", values, marker=None)


def evaluation_plot(run: Run, metric: str) -> Plot | None:
    """One validation metric over samples, both sides."""

    def values(side: Run) -> list[tuple[int, float]]:
        pairs = ((entry["samples"], results(entry["metrics"]).get(metric)) for entry in side.select("evaluation"))
        return [(samples, value) for samples, value in pairs if value is not None]

    return _lines("evaluation", run, f"validation {metric}", values, marker="o")


def time_plot(run: Run) -> Plot:
    """Wall-clock seconds of both sides, split by phase, as stacked bars."""
    sides = _sides(run)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for row, (_, side, _) in enumerate(sides):
            left = 0.0
            for phase in PHASES:
                seconds = side.seconds.get(phase, 0.0)
                label = phase if row == 0 else None
                axes.barh(row, seconds, 0.6, left, color=_COLOUR[f"--phase-{phase}"], label=label, linewidth=0)
                left += seconds
        axes.set_yticks(range(len(sides)), [label for label, _, _ in sides])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        figure.legend(loc="outside upper left", ncols=3 if narrow else len(PHASES))

    said = "; ".join(
        f"{label}: {', '.join(f'{phase} {side.seconds.get(phase, 0.0):.1f} s' for phase in PHASES)}"
        for label, side, _ in sides
    )
    return draw_plot("time", f"Time split. {said}.", 1.6 + 0.45 * len(sides), draw)


def step_plot(run: Run) -> Plot | None:
    """Median step time of each interval against the bound, in milliseconds; ``None`` where none was measured."""
    series: list[tuple[str, str, str, list[tuple[int, float]]]] = []
    for label, side, colour in _sides(run):
        measured = interval_values(side, "step_seconds")
        if measured:
            series.append((f"{label}, measured", colour, "-", measured))
    bound = interval_values(run, "bound_seconds")
    if bound:
        series.append(("bound", BOUND, "--", bound))
    if not series:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for label, colour, style, points in series:
            samples, values = zip(*points, strict=True)
            axes.plot(
                samples, [1000 * v for v in values], style, color=colour, linewidth=1.6, marker="o", markersize=3,
                label=label,
            )  # fmt: skip
        axes.set_ylim(0, 1100 * max(value for *_, points in series for _, value in points))
        axes.set_ylabel("milliseconds a step")
        axes.grid(axis="y")
        _samples_axis(axes, run, narrow)
        figure.legend(loc="outside upper left", ncols=1 if narrow else len(series))

    said = "; ".join(f"{label} from {1000 * p[0][1]:.1f} to {1000 * p[-1][1]:.1f} ms" for label, _, _, p in series)
    return draw_plot("steps", f"Step time of each interval over samples seen: {said}.", 2.9, draw)


def interval_values(run: Run, field: str) -> list[tuple[int, float]]:
    """``(samples, value)`` of every interval that has a value for ``field``."""
    pairs = ((entry["samples"], as_number(entry.get(field))) for entry in run.select("interval"))
    return [(samples, value) for samples, value in pairs if value is not None]
