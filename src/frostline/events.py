"""The event log of a run: every decision with the numbers behind it, one JSON object a line.

The schema is in ``docs/architecture.md``. A line is written whole and flushed, so that a killed run
leaves a readable log; :func:`read_events` ignores a torn last line.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["PHASES", "TRAINING_PHASES", "EventLog", "environment", "json_safe", "read_events"]

PHASES = ("train", "statistics", "decide", "evaluate", "save", "other")
"""The parts of the wall-clock time of a run; they do not overlap and add up to ``total``."""

TRAINING_PHASES = ("train", "statistics", "decide")
"""Those that are training time: the steps, and what measuring and deciding cost."""


def json_safe(value: Any) -> Any:
    """JSON has no NaN or infinity: write them as strings, so that every reader can load the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return value


class EventLog:
    """Appends events to ``path``; with ``path=None`` they are kept in memory only."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.events: list[dict[str, Any]] = []
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, event: str, *, step: int, samples: int, **fields: Any) -> dict[str, Any]:
        """Write one event and return it."""
        record = {"event": event, "time": time.time(), "step": step, "samples": samples, **json_safe(fields)}
        if self.path is None:
            self.events.append(record)
        else:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def offset(self) -> int:
        """Where the log stands: bytes on disk, or events in memory. Goes into the checkpoint."""
        if self.path is None:
            return len(self.events)
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, offset: int) -> None:
        """Forget what was logged after ``offset``: a resumed run repeats it."""
        if self.path is None:
            del self.events[offset:]
        elif self.path.exists() and self.path.stat().st_size > offset:
            os.truncate(self.path, offset)


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log in order; a torn last line (a killed run) is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    packages: dict[str, str] = {}
    for name in ("frostline", "torch", "transformers", "accelerate", "datasets", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
