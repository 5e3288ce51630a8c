"""Folders with records that runs have left: what is in them, whether it is sound, and taking them away."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline.cache.disk import LOCK, MANIFEST
from frostline.cache.slots import file_numbers, read_slots
from frostline.errors import ConfigError

__all__ = ["Folder", "folders", "remove", "verify"]


@dataclass(frozen=True)
class Folder:
    """One run's records on disk. ``nbytes`` is what the files take; ``about`` is its manifest."""

    path: Path
    nbytes: int
    in_use: bool
    about: dict[str, Any]


def folders(root: Path) -> Iterator[Folder]:
    """The folders under ``root`` that hold records, by name."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.is_dir() and file_numbers(path):
            about: dict[str, Any] = {}
            with suppress(OSError, ValueError):  # killed before it was written
                about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            yield Folder(path, size, _in_use(path), about)


def verify(folder: Path) -> tuple[int, int]:
    """Read every slot: how many records are sound, and how many slots hold none (torn, rotten or given up).

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = list(read_slots(folder))
    except OSError as error:
        raise ConfigError(f"cannot read {str(folder)!r}: {error.strerror or error}") from None
    return sum(found), len(found) - sum(found)


def remove(folder: Folder) -> None:
    """Take a folder away.

    Raises:
        ConfigError: a run uses it, or it cannot be removed.
    """
    if folder.in_use:
        raise ConfigError(f"{str(folder.path)!r} is used by a run")
    try:
        shutil.rmtree(folder.path)
    except OSError as error:
        raise ConfigError(f"cannot remove {str(folder.path)!r}: {error.strerror or error}") from None


def _in_use(path: Path) -> bool:
    try:
        file = os.open(path / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
