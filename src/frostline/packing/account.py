"""What the stages of a run have taken: ranks, time, and money."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ACCOUNT", "Entry", "account", "cost_of", "note"]

ACCOUNT = "launch.json"


@dataclass(frozen=True)
class Entry:
    """What a stage took from the start of its processes to their end.

    Attributes:
        stage: its number; a stage that was stopped and resumed has several entries.
        ranks: processes.
        batch: samples in a step.
        seconds: of time.
        cpu_seconds: of the processes on the first rank's host.
    """

    stage: int
    ranks: int
    batch: int
    seconds: float
    cpu_seconds: float

    @property
    def rank_hours(self) -> float:
        return self.ranks * self.seconds / 3600


def account(run: Path) -> list[Entry]:
    """What the stages of ``run`` have taken, in order; nothing where it was not launched."""
    path = run / ACCOUNT
    if not path.is_file():
        return []
    return [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def note(run: Path, entry: Entry) -> None:
    """Add ``entry``; the file is replaced whole."""
    entries = [*account(run), entry]
    temporary = run / f"{ACCOUNT}.tmp"
    temporary.write_text(json.dumps([asdict(one) for one in entries], indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, run / ACCOUNT)


def cost_of(entries: Sequence[Entry], price: float) -> float:
    """What ``entries`` cost at ``price`` for one rank and hour."""
    return price * sum(entry.rank_hours for entry in entries)
