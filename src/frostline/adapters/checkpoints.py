"""Which Trainer checkpoint a run can really continue from.

The Trainer writes ``trainer_state.json`` last, so a directory where it reads as JSON was written to its end; a
directory that a kill left half-written has none, or a torn one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from frostline.state import is_complete

__all__ = ["newest_complete"]

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_complete(directory: str | Path, *, ours: bool) -> Path | None:
    """The newest ``checkpoint-<step>`` in ``directory`` that was written to its end.

    Args:
        directory: the Trainer's output directory.
        ours: ask for Frostline's state as well.
    """
    folder = Path(directory)
    if not folder.is_dir():
        return None
    steps = {int(m[1]): path for path in folder.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()}
    for step in sorted(steps, reverse=True):
        if _was_finished(steps[step]) and (not ours or is_complete(steps[step])):
            return steps[step]
    return None


def _was_finished(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
