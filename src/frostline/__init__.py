"""Frostline makes fine-tuning of pre-trained models cheaper by freezing blocks that have converged.

``attach(trainer)`` for a Hugging Face Trainer, :class:`Frostline` for any other loop.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError, DataError, FrostlineError, ModelError, RankError, ResumeError

if TYPE_CHECKING:
    from frostline.adapters.huggingface import attach
    from frostline.adapters.lightning import FrostlineCallback
    from frostline.blocks import BlockStack
    from frostline.engine import Frostline
    from frostline.events import EventLog
    from frostline.policies import Decision, Policy, register
    from frostline.summary import Summary

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
    "RankError",
    "ResumeError",
    "Summary",
    "attach",
    "register",
]

try:
    __version__ = metadata.version("frostline")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

# On first use: torch costs seconds to import, and the adapters' hosts are extras.
_LAZY = {
    "BlockStack": "frostline.blocks",
    "Decision": "frostline.policies",
    "EventLog": "frostline.events",
    "Frostline": "frostline.engine",
    "FrostlineCallback": "frostline.adapters.lightning",
    "Policy": "frostline.policies",
    "Summary": "frostline.summary",
    "attach": "frostline.adapters.huggingface",
    "register": "frostline.policies",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
