"""Frostline makes fine-tuning of pre-trained models cheaper by freezing blocks that have converged.

``attach(trainer)`` for a Hugging Face Trainer, :class:`Frostline` for any other loop.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from frostline.blocks import BlockStack
from frostline.engine import Frostline, Summary
from frostline.errors import ConfigError, DataError, FrostlineError, ModelError, ResumeError
from frostline.events import EventLog
from frostline.policies import Decision, Policy, register

if TYPE_CHECKING:
    from frostline.adapters.huggingface import attach
    from frostline.adapters.lightning import FrostlineCallback

__all__ = [
    "BlockStack",
    "ConfigError",
    "DataError",
    "Decision",
    "EventLog",
    "Frostline",
    "FrostlineCallback",
    "FrostlineError",
    "ModelError",
    "Policy",
    "ResumeError",
    "Summary",
    "attach",
    "register",
]

try:
    __version__ = metadata.version("frostline")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

# Adapters import their host framework, which is an extra: only when asked for.
_LAZY = {"attach": "frostline.adapters.huggingface", "FrostlineCallback": "frostline.adapters.lightning"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
