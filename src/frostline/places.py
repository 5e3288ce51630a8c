"""Where things are kept on a user's machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """The user's cache: ``$FROSTLINE_CACHE``, else ``$XDG_CACHE_HOME/frostline``, else ``~/.cache/frostline``."""
    if chosen := os.environ.get("FROSTLINE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "frostline"
