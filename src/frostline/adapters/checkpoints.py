"""Which Trainer checkpoint a run can really continue from.

The Trainer writes ``trainer_state.json`` last, so a directory where it reads as JSON was written to its end; a
directory that a kill left half-written has none, or a torn one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from frostline.errors import ResumeError
from frostline.state import fingerprint, has_state, is_complete, load_state
from frostline.trace import unwrap

__all__ = ["check", "newest_complete"]

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


def check(checkpoint: Path, model: nn.Module | None) -> None:
    """Refuse a checkpoint that cannot be continued from, before the Trainer loads anything of it.

    One without any state of ours is good: it comes from a run without Frostline.

    Args:
        checkpoint: a directory that the Trainer wrote.
        model: what is to continue from it (``None``: not built yet, not compared).

    Raises:
        ResumeError: it is not there, not whole, or of another model.
    """
    if not checkpoint.is_dir():
        raise ResumeError(f"nothing to resume: {checkpoint} is not a directory")
    if not _was_finished(checkpoint):
        raise ResumeError(f"{checkpoint} was not written to its end: trainer_state.json is missing or torn")
    if has_state(checkpoint):
        saved = load_state(checkpoint)[0].get("model")  # policy none knows no blocks, and says nothing of the model
        found = fingerprint(unwrap(model), saved["blocks"]) if model is not None and saved is not None else saved
        if saved != found:
            raise ResumeError(f"{checkpoint} belongs to another model: {saved}, this one is {found}")


def _was_finished(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
