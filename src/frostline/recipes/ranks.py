"""A recipe on several ranks: the first one reads and writes what there is one of, and all end with the same error."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from accelerate.utils import gather_object

from frostline.distributed import from_first
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
    if not (dist.is_available() and dist.is_initialized()):
        raise FrostlineError(f"{ranks()} ranks were started, and nothing has joined them to a process group")
    return from_first(action)


def unseen(path: Path) -> list[int]:
    """The ranks that cannot see the file that the first one has written; all ranks call this at the same point."""
    waited = time.monotonic() + _PATIENCE
    while not path.is_file() and time.monotonic() < waited:
        time.sleep(0.1)
    seen: list[bool] = gather_object([path.is_file()])
    return [number for number, there in enumerate(seen) if not there]
