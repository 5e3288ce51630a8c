"""What a user may say of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from frostline.errors import ConfigError, choices_message, validation_message
from frostline.memory.levels import LEVELS

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
    def _is_known(cls, value: Any) -> Any:
        value = "off" if value is False else value  # YAML reads the word off as false
        if value not in LEVELS:
            raise ValueError(choices_message("memory level", str(value), LEVELS))
        return value

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
    if isinstance(setting, MemoryOptions):
        return setting
    given = {"level": setting} if isinstance(setting, str) else dict(setting)
    try:
        return MemoryOptions(**given)
    except ValidationError as error:
        raise ConfigError(validation_message(error, "memory", MemoryOptions.model_fields)) from None
