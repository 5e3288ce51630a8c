"""What a user may say of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

from frostline.memory.levels import LEVELS
from frostline.settings import one_of, options_from

__all__ = ["MemoryOptions", "MemorySetting", "memory_options"]


class MemoryOptions(BaseModel):
    """How the tensors that autograd saves are kept.

    ``level``: ``off``; ``safe`` (8 bits); ``slimfit`` (8 bits, 4 where gradients bear it: within a cosine of 0.99);
    ``published`` (SlimFit's released formats); ``max`` (4 bits wherever gradients bear it). ``budget``: bytes (or
    "6GiB") that a process may take for weights, optimizer's state, gradients and activations; what does not fit is
    made to, by micro-batches, gradient checkpointing, or compression up to ``level`` (default then: ``slimfit``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: str = "off"
    budget: ByteSize | None = Field(default=None, gt=0)

    @field_validator("level", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> str:
        return one_of("memory level", value, LEVELS)

    @property
    def strongest(self) -> str:
        """The strongest level that a plan for ``budget`` may choose."""
        return self.level if "level" in self.model_fields_set else "slimfit"


MemorySetting = str | Mapping[str, Any] | MemoryOptions


def memory_options(setting: MemorySetting) -> MemoryOptions:
    """Options from a level alone (``"slimfit"``) or from all of them.

    Raises:
        ConfigError: an unknown level or option.
    """
    return options_from(setting, MemoryOptions, "level", "memory")
