"""Reading a run directory: ``events.jsonl`` and, where the run has ended, ``summary.json``.

Everything that reports on a run reads it through :func:`load_run`. A killed run has no summary; the same
properties are then worked out from its events, so that it can be reported, compared and replayed too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frostline.errors import FrostlineError
from frostline.events import PHASES, TRAINING_PHASES, read_events

__all__ = ["Point", "Run", "as_number", "load_run", "results"]

"""The parts of a run's wall-clock time; they do not overlap and add up to ``total``."""

# What transformers adds to the metrics of an evaluation; these are timings, not results.
_NOT_RESULTS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


def as_number(value: Any) -> float | None:
    """A number of the log as a float; the log writes NaN and infinity as strings, and unknown as null."""
    return None if value is None else float(value)


@dataclass(frozen=True)
class Point:
    """One point of a trajectory: from ``samples`` seen (optimizer step ``step``) on, ``depth`` blocks are frozen."""

    step: int
    samples: int
    depth: int


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk.

    ``summary`` is ``None`` for a run that was killed or is still going; ``recipe`` is empty for a run that was
    not started from a recipe; ``baseline`` is plain fine-tuning beside it; ``notes`` says what could not be read.
    """

    path: Path
    events: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None
    recipe: dict[str, Any]
    baseline: Run | None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name; a baseline carries its run's name too."""
        resolved = self.path.resolve()
        return f"{resolved.parent.name}/{resolved.name}" if resolved.name == "baseline" else resolved.name

    @property
    def finished(self) -> bool:
        return self.summary is not None

    def select(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [entry for entry in self.events if entry["event"] == event]

    @property
    def header(self) -> dict[str, Any]:
        """The ``run`` event: policy, model, stack, plan, environment."""
        return self.select("run")[-1]

    def _known(self, key: str) -> Any:
        """What the summary says, else what the ``run`` event says."""
        if self.summary is not None and self.summary.get(key) is not None:
            return self.summary[key]
        return self.header.get(key)

    @property
    def policy(self) -> str:
        return str((self._known("policy") or {}).get("name", "none"))

    @property
    def options(self) -> dict[str, Any]:
        return dict((self._known("policy") or {}).get("options") or {})

    @property
    def model(self) -> str:
        """What was fine-tuned: the recipe's model, with the model's class."""
        known, asked = self._known("model"), self.recipe.get("model")
        return " · ".join(str(part) for part in (asked, known) if part) or "unknown"

    @property
    def stack(self) -> str:
        return str(self._known("stack") or "")

    @property
    def blocks(self) -> int:
        """Number of blocks N; 0 where it is not known (plain fine-tuning looks for no stack)."""
        return int(self._known("blocks") or 0)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan's numbers as logged; empty where the run had no policy."""
        return dict(self.header.get("plan") or {})

    @property
    def environment(self) -> dict[str, Any]:
        return dict(self._known("environment") or {})

    @property
    def seed(self) -> int | None:
        found = self._known("seed")
        return self.recipe.get("seed") if found is None else found

    @property
    def steps(self) -> int:
        return int(self.summary["steps"]) if self.summary is not None else max(e["step"] for e in self.events)

    @property
    def samples(self) -> int:
        return int(self.summary["samples"]) if self.summary is not None else max(e["samples"] for e in self.events)

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The ``decision`` events that were taken on an observation, in order."""
        return [entry for entry in self.select("decision") if entry.get("observation")]

    @property
    def trajectory(self) -> list[Point]:
        """Depth over the run; the first point is the depth of the first step."""
        if self.summary is not None:
            moves = [Point(int(p["step"]), int(p["samples"]), int(p["depth"])) for p in self.summary["trajectory"]]
        else:
            moves = _moves(self.events)
        return moves if moves and moves[0].samples == 0 else [Point(0, 0, 0), *moves]

    @property
    def final_depth(self) -> int:
        return self.trajectory[-1].depth

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase and ``total``; so far, and as far as logged, for a run that has not ended."""
        ended = self.select("end")
        if self.summary is not None or ended:
            given = self.summary["seconds"] if self.summary is not None else ended[-1]["seconds"]
            return {key: float(given[key]) for key in (*PHASES, "total") if given.get(key) is not None}
        split = dict.fromkeys(PHASES, 0.0)
        for interval in self.select("interval"):
            for phase in PHASES:
                split[phase] += float(interval["seconds"].get(phase) or 0.0)
        return {**split, "total": sum(split.values())}

    @property
    def training_seconds(self) -> float:
        """Seconds of the training loop, with what measuring and deciding cost."""
        return sum(self.seconds.get(phase, 0.0) for phase in TRAINING_PHASES)

    @property
    def validation(self) -> dict[str, float]:
        """Validation metrics of the last evaluation."""
        if self.summary is not None:
            return results(self.summary.get("metrics") or {})
        evaluations = self.select("evaluation")
        return results(evaluations[-1]["metrics"]) if evaluations else {}

    @property
    def test(self) -> dict[str, float]:
        """Test metrics; empty for a run that has not ended or had no test split."""
        return results((self.summary or {}).get("test") or {})

    @property
    def limits(self) -> list[str]:
        """What could not be done for this model, each said once."""
        said = [str(entry["message"]) for entry in self.select("limit")]
        said += [str(message) for message in (self.summary or {}).get("limits") or []]
        return list(dict.fromkeys(said))


def results(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The results among a metrics dictionary, without prefixes: accuracy first, then by name, the loss last."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        short = name.removeprefix("eval_").removeprefix("test_")
        number = as_number(value) if isinstance(value, (int, float, str)) else None
        if number is not None and short not in _NOT_RESULTS:
            found[short] = number
    return dict(sorted(found.items(), key=lambda item: (item[0] == "loss", item[0] != "accuracy", item[0])))


def _moves(events: Iterable[dict[str, Any]]) -> list[Point]:
    """The moves of the frost line of a run without a summary.

    A depth that holds from the first step is no ``decision`` of the log; the first decision, or interval, has it.
    """
    moves: list[Point] = []
    for entry in events:
        if entry["event"] == "decision":
            if not moves:
                moves.append(Point(0, 0, int(entry["depth_before"])))
            if int(entry["depth"]) != moves[-1].depth:
                moves.append(Point(int(entry["step"]), int(entry["samples"]), int(entry["depth"])))
        elif entry["event"] == "interval" and not moves:
            moves.append(Point(0, 0, int(entry.get("depth") or 0)))
    return moves


def _last_training(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the last training in a log.

    A Trainer that trains twice, or tries again with a smaller batch (``auto_find_batch_size``), starts anew with
    another ``run`` event. A resumed training goes on instead: its ``resume`` comes before anything is trained.
    """
    start = 0
    for index, entry in enumerate(events):
        if entry["event"] == "run" and any(_trained(earlier) for earlier in events[start:index]):
            following = (later for later in events[index + 1 :] if later["event"] == "resume" or _trained(later))
            if next(following, entry)["event"] != "resume":
                start = index
    return events[start:]


def _trained(entry: dict[str, Any]) -> bool:
    return entry["event"] in ("decision", "interval", "loss", "evaluation", "checkpoint", "end")


def load_run(path: str | Path) -> Run:
    """Read a run directory, and the baseline inside it where there is one.

    Raises :class:`FrostlineError` where there is no run at ``path``, or its files are torn or incomplete. A torn
    last line of the log is no error (a killed run); neither is a missing ``summary.json``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FrostlineError(f"no run at '{folder}': {'it is a file' if folder.exists() else 'no such folder'}")
    log = folder / "events.jsonl"
    if not log.is_file():
        inside = sorted(child.name for child in folder.iterdir() if (child / "events.jsonl").is_file())
        hint = f"; runs inside it: {', '.join(inside)}" if inside else " (a run directory has events.jsonl)"
        raise FrostlineError(f"'{folder}' is not a run: it has no events.jsonl{hint}")
    events = _last_training(_read_log(log))
    summary = _read_summary(folder / "summary.json")
    recipe, notes = _read_recipe(folder / "recipe.yaml")
    baseline = None
    if (folder / "baseline" / "events.jsonl").is_file():
        try:
            baseline = load_run(folder / "baseline")
        except FrostlineError as error:
            # A baseline killed at its first breath must not hide the run beside it.
            notes.append(f"the baseline is left out: {error}")
    return Run(folder, tuple(events), summary, recipe, baseline, tuple(notes))


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        events = list(read_events(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FrostlineError(f"cannot read '{path}': {error}") from None
    if not all(isinstance(entry, dict) and {"event", "step", "samples"} <= entry.keys() for entry in events):
        raise FrostlineError(f"'{path}' is not an event log: every line needs `event`, `step` and `samples`")
    if not any(entry["event"] == "run" for entry in events):
        raise FrostlineError(f"'{path}' has no `run` event: the run ended before its training began")
    return events


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FrostlineError(f"cannot read '{path}': {error}") from None
    needed = {"policy", "model", "trajectory", "steps", "samples", "seconds"}
    missing = sorted(needed - summary.keys()) if isinstance(summary, dict) else sorted(needed)
    if missing:
        raise FrostlineError(f"'{path}' is incomplete: it lacks {', '.join(missing)}")
    return dict(summary)


def _read_recipe(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The resolved recipe as plain values, and what is wrong with it; a report can do without it."""
    if not path.is_file():
        return {}, []
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, [f"recipe.yaml cannot be read: {' '.join(str(error).split())}"]
    return (recipe, []) if isinstance(recipe, dict) else ({}, ["recipe.yaml is not a mapping"])
