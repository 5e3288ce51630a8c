"""A recipe on several ranks: the first one reads and writes what there is one of, and all end with the same error."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from frostline.errors import FrostlineError

__all__ = ["agreed", "is_first", "rank", "ranks", "unseen"]

# For a file system of several hosts to show what another one has written.
_PATIENCE = 10.0

T = TypeVar("T")


def ranks() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def agreed(action: Callable[[], T]) -> T:
    """What ``action`` gives on the first rank, on every rank; all ranks call this at the same point.

    Raises:
        FrostlineError: what it raised there; of another error, that there was one.
    """
    if ranks() == 1:
        return action()
    if PartialState().num_processes != ranks():
        raise FrostlineError(f"{ranks()} ranks were started, and Accelerate has joined {PartialState().num_processes}")
    outcome: list[object] = [None, None]
    failed: Exception | None = None
    if is_first():
        try:
            outcome[0] = action()
        except Exception as error:
            failed = error
            outcome[1] = error if isinstance(error, FrostlineError) else FrostlineError(f"on the first rank: {error!r}")
    found, fault = broadcast_object_list(outcome)
    if failed is not None:
        raise failed
    if isinstance(fault, FrostlineError):
        raise fault
    return found  # type: ignore[no-any-return]


def unseen(path: Path) -> list[int]:
    """The ranks that cannot see the file that the first one has written; all ranks call this at the same point."""
    waited = time.monotonic() + _PATIENCE
    while not path.is_file() and time.monotonic() < waited:
        time.sleep(0.1)
    seen: list[bool] = gather_object([path.is_file()])
    return [number for number, there in enumerate(seen) if not there]
