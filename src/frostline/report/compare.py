"""Two runs side by side, and whether their figures may be compared at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import FrostlineError
from frostline.packing import account, cost_of
from frostline.report.run import Point, Run, load_run
from frostline.report.stages import price_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Row", "compare", "depth_text", "differences", "policy_text", "speed_ups"]

# The parts of a recipe that must agree; the rest (policy, cache, where the run is kept) is what is being compared.
_SHARED_SETTINGS = ("task", "model", "data", "max_length", "image_size", "schedule", "training")
_MACHINE = ("processor", "cores", "threads", "gpu")


@dataclass(frozen=True)
class Row:
    """One line of a comparison; a value that is not known is ``"-"``."""

    label: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. ``warnings`` says why figures of the two must not be set against each other."""

    names: tuple[str, str]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    def table(self) -> Table:
        """A rich table of the rows; names that look like rich markup stay as they are."""
        try:
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            raise FrostlineError("the comparison table needs rich: pip install 'frostline[cli]'") from None
        table = Table()
        for title in ("", *self.names):
            table.add_column(Text(title), overflow="fold")
        for row in self.rows:
            table.add_row(Text(row.label), Text(row.first), Text(row.second))
        return table

    def render(self) -> str:
        """The comparison as plain text, for logs and pipes."""
        lines = [("", *self.names), *((row.label, row.first, row.second) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        text = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines]
        return "\n".join([*text, *(f"not comparable: {warning}" for warning in self.warnings)])

    def __str__(self) -> str:
        return self.render()


def compare(first: Run | str | Path, second: Run | str | Path) -> Comparison:
    """Set two runs side by side; each is a :class:`Run` or a run directory.

    Speed-ups are over the one run of the two that is plain fine-tuning (policy ``none``), else over the first.
    Raises :class:`FrostlineError` where a directory holds no run.
    """
    a = first if isinstance(first, Run) else load_run(first)
    b = second if isinstance(second, Run) else load_run(second)
    names = (a.name, b.name) if a.name != b.name else (str(a.path), str(b.path))
    reference = b if b.policy == "none" and a.policy != "none" else a
    over = names[1] if reference is b else names[0]
    faster = (speed_ups(reference, a), speed_ups(reference, b))

    rows = [
        Row("policy", policy_text(a), policy_text(b)),
        Row("model", a.model, b.model),
        Row("status", _status(a), _status(b)),
    ]
    for split, left, right in (("validation", a.validation, b.validation), ("test", a.test, b.test)):
        for metric in dict.fromkeys([*left, *right]):
            rows.append(Row(f"{split} {metric}", _metric(left.get(metric)), _metric(right.get(metric))))
    rows += [
        Row("training seconds", _seconds(a.training_seconds), _seconds(b.training_seconds)),
        Row("total seconds", _seconds(a.seconds.get("total")), _seconds(b.seconds.get("total"))),
        Row(f"training speed-up over {over}", faster[0][0], faster[1][0]),
        Row(f"total speed-up over {over}", faster[0][1], faster[1][1]),
        *_packed(a, b),
        Row("final depth (blocks frozen)", depth_text(a), depth_text(b)),
        Row("trajectory (depth from sample)", trajectory_text(a.trajectory), trajectory_text(b.trajectory)),
        Row("decisions", str(len(a.decisions)), str(len(b.decisions))),
        Row("optimizer steps", f"{a.steps:,}", f"{b.steps:,}"),
        Row("seed", _plain(a.seed), _plain(b.seed)),
        Row("machine", machine_text(a), machine_text(b)),
        Row("versions", versions_text(a), versions_text(b)),
    ]
    return Comparison(names, tuple(rows), tuple(differences(a, b)))


def differences(a: Run, b: Run) -> list[str]:
    """Why the figures of two runs must not be set against each other; empty where they may."""
    found = []
    for run in (a, b):
        if not run.finished:
            found.append(f"{run.name} has not finished ({run.steps:,} steps)")
    here, there = a.environment, b.environment
    for key in _MACHINE:
        if here.get(key) != there.get(key):
            found.append(f"different machine, {key}: {_plain(here.get(key))} and {_plain(there.get(key))}")
    versions = [{"python": e.get("python"), **(e.get("packages") or {})} for e in (here, there)]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        old, new = versions[0].get(package), versions[1].get(package)
        if old != new:
            found.append(f"different version, {package}: {_plain(old)} and {_plain(new)}")
    if a.seed != b.seed:
        found.append(f"different seed: {_plain(a.seed)} and {_plain(b.seed)} (a small gap may be chance)")
    if a.model != b.model and not (a.recipe and b.recipe and a.recipe.get("model") != b.recipe.get("model")):
        found.append(f"different model: {a.model} and {b.model}")
    left, right = _settings(a.recipe), _settings(b.recipe)
    if bool(left) != bool(right):
        found.append("only one of the two has a recipe: data and training settings cannot be checked")
    else:
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                kind = "data" if key.startswith("data.") else "setting"
                found.append(f"different {kind}, {key}: {_plain(left.get(key))} and {_plain(right.get(key))}")
    if a.finished and b.finished and a.samples != b.samples:
        found.append(f"different amount of training: {a.samples:,} and {b.samples:,} samples")
    return found


def policy_text(run: Run) -> str:
    options = ", ".join(f"{key}={value}" for key, value in run.options.items() if value is not None)
    return f"{run.policy} ({options})" if options else run.policy


def depth_text(run: Run) -> str:
    return f"{run.final_depth} of {run.blocks}" if run.blocks else str(run.final_depth)


def trajectory_text(points: list[Point]) -> str:
    """``0 from 0, 1 from 4,560, ...``"""
    return ", ".join(f"{point.depth} from {point.samples:,}" for point in points)


def machine_text(run: Run) -> str:
    known = run.environment
    parts = [known.get("gpu"), known.get("processor")]
    parts += [f"{key} {known[key]}" for key in ("cores", "threads") if known.get(key) is not None]
    return ", ".join(str(part) for part in parts if part) or "-"


def versions_text(run: Run) -> str:
    known = run.environment
    versions = {"python": known.get("python"), **(known.get("packages") or {})}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "-"


def _status(run: Run) -> str:
    return "finished" if run.finished else f"unfinished after {run.steps:,} steps"


def speed_ups(reference: Run, run: Run) -> tuple[str, str]:
    """How many times faster ``run`` is than ``reference``: training, and start to end.

    ``"-"`` where the two did not train on as many samples: the shorter one is not the faster one.
    """
    if run.samples != reference.samples:
        return "-", "-"
    pairs = (
        (reference.training_seconds, run.training_seconds),
        (reference.seconds.get("total"), run.seconds.get("total")),
    )
    training, total = (f"{before / after:.2f}x" if before and after else "-" for before, after in pairs)
    return training, total


def _packed(a: Run, b: Run) -> list[Row]:
    """What launched runs took of ranks and money."""
    taken, prices = [account(run.path) for run in (a, b)], [price_of(run) for run in (a, b)]
    if not any(taken):
        return []
    hours = [f"{sum(entry.rank_hours for entry in entries):.4f}" if entries else "-" for entries in taken]
    rows = [Row("rank-hours", *hours)]
    if any(price is not None for price in prices):
        costs = [
            f"{cost_of(entries, price):.4g}" if entries and price is not None else "-"
            for entries, price in zip(taken, prices, strict=True)
        ]
        rows.append(Row("cost", *costs))
    return rows


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The shared settings of a recipe as ``{"data.source": ...}``."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value

    for name in _SHARED_SETTINGS:
        if name in recipe:
            walk(name, recipe[name])
    return flat
