"""The errors Frostline raises, and the helper that names close matches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ConfigError",
    "DataError",
    "FrostlineError",
    "ModelError",
    "RankError",
    "ResumeError",
    "choices_message",
    "validation_message",
]


class FrostlineError(Exception):
    """Base of every error a user can act on; the command line prints it on one line and exits with 2."""


class ConfigError(FrostlineError, ValueError):
    """A setting has a value it cannot have (names the value, the rule and the valid choices)."""


class ModelError(FrostlineError, ValueError):
    """The model, or the way it is wrapped, cannot be frozen by depth."""


class DataError(FrostlineError, ValueError):
    """The data cannot be read, or lack what the task needs."""


class RankError(FrostlineError, RuntimeError):
    """Another rank has not come to an exchange: it hangs, or has ended."""


class ResumeError(FrostlineError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to something else."""


def choices_message(kind: str, name: str, choices: Iterable[str]) -> str:
    """Say that ``name`` is no ``kind``, with the close matches first and then every choice.

    >>> choices_message("policy", "gradnorm", ["none", "gradient-norm"])
    "unknown policy 'gradnorm': did you mean 'gradient-norm'? Valid choices: gradient-norm, none"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return f"unknown {kind} {name!r}:{hint} Valid choices: {', '.join(known) or '(none)'}"


def validation_message(error: Any, kind: str, known: Iterable[str]) -> str:
    """Every fault of a pydantic ``ValidationError`` in one line; ``known`` are the options that ``kind`` has."""
    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        message = str(fault["msg"]).removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            faults.append(choices_message(f"option of {kind}", where, known))
        else:
            faults.append(f"{kind}, {where}={fault['input']!r}: {message}" if where else f"{kind}: {message}")
    return "; ".join(faults)
