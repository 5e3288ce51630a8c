"""``report.html``: one self-contained page about a run, with plots and the numbers behind them.

The page has no script and fetches nothing (its content security policy forbids both), so it can be mailed, kept
as a build artefact and opened offline.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.events import PHASES
from frostline.report.compare import compare, depth_text, policy_text, speed_ups
from frostline.report.pages import Numbers, Section, put_in_place, templates
from frostline.report.run import Run, as_number, load_run, results
from frostline.report.stages import stages_section

if TYPE_CHECKING:
    from frostline.report.plots import Plot

__all__ = ["render_report", "write_report"]

_ROWS = 400  # a table longer than this is thinned out: the page must stay light; the log has every row


def write_report(path: str | Path) -> Path:
    """Write ``report.html`` into the run directory ``path`` and return where it is.

    The file is put in place whole or not at all. Raises :class:`FrostlineError` where there is no run, the extra
    ``report`` is not installed, or the directory cannot be written.
    """
    run = load_run(path)
    page = render_report(run)
    target = run.path / "report.html"
    put_in_place(page, target)
    return target


def render_report(run: Run) -> str:
    """The page as a string."""
    environment = templates("a report needs")
    from frostline.report import plots

    sections = [
        _trajectory(run, plots.trajectory_plot(run)),
        _decisions(run, plots.decision_plot(run)),
        *_cache(run),
        *stages_section(run),
        _losses(run, plots.loss_plot(run)),
        _evaluations(run, plots.evaluation_plot(run, _main_metric(run))),
        _time(run, plots.time_plot(run)),
        _steps(run, plots.step_plot(run)),
    ]
    against = compare(run, run.baseline) if run.baseline is not None else None
    return environment.get_template("report.html.j2").render(
        run=run,
        started=_day(run.events[0].get("time")),
        cards=_cards(run),
        against=against,
        facts=_facts(run),
        sections=sections,
        environment=_environment(run),
    )


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """The figures on top: label, value, and what it is to be read against."""
    base = run.baseline
    cards = []
    for split, found, other in (
        ("validation", run.validation, base.validation if base else {}),
        ("test", run.test, base.test if base else {}),
    ):
        metric = next(iter(found), None)
        if metric is not None:
            beside = f"baseline {other[metric]:.4f}" if metric in other else ""
            cards.append((f"{split} {metric}", f"{found[metric]:.4f}", beside))
    beside = f"baseline {base.training_seconds:,.1f} s" if base else ""
    cards.append(("training time", f"{run.training_seconds:,.1f} s", beside))
    if base:
        training, total = speed_ups(base, run)
        cards.append(("training speed-up", training, f"whole run {total}"))
    cards.append(("blocks frozen", depth_text(run), f"{len(run.decisions)} decisions"))
    return cards


def _facts(run: Run) -> Numbers:
    rows = [
        ("policy", policy_text(run)),
        ("model", run.model),
        ("stack", f"{run.stack} ({run.blocks} blocks)" if run.stack else "-"),
        ("optimizer steps", f"{run.steps:,}"),
        ("samples", f"{run.samples:,}"),
        ("seed", "-" if run.seed is None else str(run.seed)),
    ]
    rows += [(f"{split} {name}", _number(value)) for split, name, value in _metrics(run)]
    return Numbers("The run", ("what", "value"), rows)


def _metrics(run: Run) -> Iterable[tuple[str, str, float]]:
    for split, found in (("validation", run.validation), ("test", run.test)):
        for name, value in found.items():
            yield split, name, value


def _trajectory(run: Run, plot: Plot) -> Section:
    rows = [(f"{point.samples:,}", f"{point.step:,}", str(point.depth)) for point in run.trajectory]
    table = Numbers("Trajectory", ("from sample", "from step", "depth"), rows)
    text = "Depth is the number of leading blocks that no longer train. Vertical lines are epochs."
    return Section("trajectory", "Trajectory", text, plot, [table])


def _decisions(run: Run, plot: Plot | None) -> Section:
    title = "Scores behind each decision"
    if not run.decisions:
        return Section("decisions", title, f"Policy {run.policy} took no decisions while training.", None, [])
    explained = any(entry["explanation"].get("changes") for entry in run.decisions)
    text = (
        "Colour: change of a block's statistic since the last decision, divided by the threshold of that decision. "
        "Blue is below the threshold (may freeze), red at or above it (stays active). Solid grey: already frozen. "
        "Faint: no figure for that decision. The line is the frost line after the decision; block 0 is nearest "
        "the input."
        if explained
        else "Colour: the recorded score of each block. Solid grey: frozen. Hatched: resting. Faint: trains, no "
        "score needed. The line is the frost line after the decision; block 0 is nearest the input."
    )
    heads = tuple(f"block {block}" for block in range(run.blocks))
    taken, changes, scores = [], [], []
    for entry in run.decisions:
        label = str(entry.get("evaluation", "-"))
        explanation, observation = entry["explanation"], entry["observation"]
        resting = len(entry.get("resting") or ())
        depth = str(entry["depth"]) if entry.get("applied", True) else f"{entry['depth']} (held: no moves left)"
        taken.append(
            (
                label,
                f"{entry['samples']:,}",
                f"{entry['step']:,}",
                str(entry["depth_before"]),
                depth,
                str(resting) if resting else "-",
                _number(explanation.get("threshold")),
                str(explanation.get("reason") or "-"),
            )
        )
        changes.append((label, *_per_block(explanation.get("changes"), run.blocks)))
        scores.append((label, *_per_block(observation.get("scores"), run.blocks)))
    columns = ("decision", "sample", "step", "depth before", "depth after", "resting layers", "threshold", "reason")
    tables = [_thin(Numbers("Decisions", columns, taken))]
    for caption, rows in (("Relative change per block", changes), ("Statistic per block", scores)):
        if any(cell != "-" for row in rows for cell in row[1:]):
            tables.append(_thin(Numbers(caption, ("decision", *heads), rows)))
    return Section("decisions", title, text, plot, tables)


_COUNTS = {
    "hits": "read at the frost line",
    "upgrades": "read below it and brought to it",
    "misses": "computed from the start",
    "written": "records written",
    "full": "records that found no room",
    "dropped": "records dropped by a thaw",
    "stale": "records dropped because a weight changed",
    "torn": "records found damaged",
    "lost": "records that could not be written after all",
    "records": "records at the end",
}


def _cache(run: Run) -> Iterable[Section]:
    counts, checks = (run.summary or {}).get("cache"), [e for e in run.select("cache") if e.get("action") == "check"]
    if not counts and not checks:
        return
    tables, text = [], "Samples with a record skip the frozen blocks."
    if counts:
        looked = sum(counts[name] for name in ("hits", "upgrades", "misses"))
        share = (counts["hits"] + counts["upgrades"]) / max(1, looked)
        text = f"{share:.0%} of the {looked:,} samples that met the frost line had a record and skipped frozen blocks."
        if counts["stopped"]:
            text += f" Caching stopped: {counts['stopped']}."
        rows = [(label, f"{counts[name]:,}") for name, label in _COUNTS.items()]
        tables.append(
            Numbers("Samples", ("what", "count"), [*rows, ("MiB at the end", f"{counts['bytes'] / 2**20:.1f}")])
        )
    if checks:
        heads = ("sample", "depth", "between passes", "skipped against full", "outcome")
        found = [
            (
                f"{e['samples']:,}",
                str(e["depth"]),
                _number(e["noise"]),
                _number(e["difference"]),
                e["refusal"]
                or ("used" if "codec" not in e else f"used in {e['codec']}, which costs {_number(e['error'])}"),
            )
            for e in checks
        ]
        tables.append(Numbers("Checks before the first hit at a depth (largest relative difference)", heads, found))
    if prices := [e for e in run.select("cache") if e.get("action") == "price"]:
        columns = ("sample", "depth", "tier", "compute (ms)", "write (ms)", "read (ms)", "KiB", "outcome")
        costs = [
            (
                f"{e['samples']:,}",
                str(e["depth"]),
                e["tier"],
                *(_number(1e3 * float(e[name])) for name in ("computing", "writing", "reading")),
                _number(e["nbytes"] / 1024),
                "used" if e["disk" if e["tier"] == "disk" else "keep"] else "does not pay: not used",
            )
            for e in prices
        ]
        tables.append(Numbers("What a record costs for one sample, measured on this run", columns, costs))
    yield Section("cache", "Cache", text, None, tables)


def _per_block(numbers: dict[str, Any] | None, blocks: int) -> list[str]:
    return [_number((numbers or {}).get(str(block))) for block in range(blocks)]


def _losses(run: Run, plot: Plot | None) -> Section:
    tables = []
    for label, side in _sides(run):
        rows = [
            (f"{e['samples']:,}", f"{e['step']:,}", _number(e.get("loss")), _number(e.get("learning_rate")))
            for e in side.select("loss")
        ]
        if rows:
            tables.append(_thin(Numbers(f"Training loss, {label}", ("sample", "step", "loss", "learning rate"), rows)))
    text = "" if plot else "No training loss was logged."
    return Section("loss", "Training loss", text, plot, tables)


def _evaluations(run: Run, plot: Plot | None) -> Section:
    tables = []
    for label, side in _sides(run):
        found = [(e, results(e["metrics"])) for e in side.select("evaluation")]
        names = tuple(dict.fromkeys(name for _, metrics in found for name in metrics))
        rows = [
            (f"{e['samples']:,}", f"{e['step']:,}", *(_number(metrics.get(name)) for name in names))
            for e, metrics in found
        ]
        if rows:
            tables.append(_thin(Numbers(f"Evaluations, {label}", ("sample", "step", *names), rows)))
    text = f"Validation {_main_metric(run)} at each evaluation." if plot else "The run has not been evaluated."
    return Section("evaluation", "Evaluation", text, plot, tables)


def _time(run: Run, plot: Plot) -> Section:
    sides = _sides(run)
    rows = [(phase, *(_number(side.seconds.get(phase), 2) for _, side in sides)) for phase in (*PHASES, "total")]
    text = "Wall-clock seconds from start to saved model."
    if not run.finished:
        text = "Wall-clock seconds as far as they were logged."
    table = Numbers("Seconds", ("phase", *(label for label, _ in sides)), rows)
    return Section("time", "Time split", text, plot, [table])


def _steps(run: Run, plot: Plot | None) -> Section:
    tables = []
    for label, side in _sides(run):
        rows = []
        for entry in side.select("interval"):
            measured, bound = as_number(entry.get("step_seconds")), as_number(entry.get("bound_seconds"))
            ratio = f"{measured / bound:.3f}" if measured and bound else "-"
            millis = [f"{1000 * value:.2f}" if value is not None else "-" for value in (measured, bound)]
            depth = "-" if entry.get("depth") is None else str(entry["depth"])
            rows.append((f"{entry['samples']:,}", depth, str(entry.get("steps", "-")), *millis, ratio))
        if rows:
            columns = ("up to sample", "depth", "steps", "median step, ms", "bound, ms", "step / bound")
            tables.append(_thin(Numbers(f"Intervals, {label}", columns, rows)))
    text = (
        "Median step of each interval, and the bound: what a step at that depth costs by counting blocks, "
        "(3N - 2k) / 3N of the step at depth 0 with k of N blocks frozen, (3N - 3k) / 3N where all samples are cached."
        if plot
        else "No step times were logged."
    )
    return Section("steps", "Step time", text, plot, tables)


def _environment(run: Run) -> Numbers:
    known = run.environment
    rows = [(key, str(value)) for key, value in known.items() if key != "packages" and value is not None]
    rows += [(name, str(version)) for name, version in (known.get("packages") or {}).items()]
    return Numbers("Environment", ("what", "value"), rows)


def _sides(run: Run) -> list[tuple[str, Run]]:
    return [(run.policy, run)] + ([("baseline", run.baseline)] if run.baseline is not None else [])


def _main_metric(run: Run) -> str:
    """The metric that is plotted: accuracy where there is one, else the first."""
    return next(iter(run.validation), "accuracy")


def _thin(table: Numbers) -> Numbers:
    if len(table.rows) <= _ROWS:
        return table
    every = -(-len(table.rows) // _ROWS)
    caption = f"{table.caption} (one row in {every}; events.jsonl has all {len(table.rows):,})"
    return Numbers(caption, table.columns, table.rows[::every])


def _number(value: Any, digits: int | None = None) -> str:
    number = as_number(value)
    if number is None:
        return "-"
    return f"{number:,.{digits}f}" if digits is not None else f"{number:.5g}"


def _day(seconds: Any) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(float(seconds), UTC):%Y-%m-%d %H:%M} UTC"
