"""What a user may say of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from frostline.memory.levels import LEVELS
from frostline.settings import Bytes, one_of, options_from, options_in

__all__ = ["NO_BUDGET", "MemoryOptions", "MemorySetting", "memory_options"]

NO_BUDGET = (
    "memory.budget needs a Hugging Face Trainer or a recipe; here set memory='slimfit' (or another level) and choose "
    "the batch yourself"
)
"""What hosts say that cannot split a batch."""


class MemoryOptions(BaseModel):
    """How the tensors that autograd saves are kept.

    ``level``: ``off``; ``safe`` (8 bits); ``slimfit`` (8 bits, 4 where gradients bear it: within a cosine of 0.99);
    ``published`` (SlimFit's released formats); ``max`` (4 bits for attention and normalisations as well). ``budget``:
    bytes (or "6GiB") that a process may take for weights, optimizer's state, gradients and activations; what does not
    fit is made to, by micro-batches, gradient checkpointing, or compression up to ``level`` (default: ``slimfit``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: str = "off"
    budget: Bytes | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        return options_in(value, cls, "level", LEVELS)

    @field_validator("level", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> str:
        if isinstance(value, str) and value[:1].isdigit():
            words = ", ".join(LEVELS)
            raise ValueError(f"a level is one of {words}; so many bytes are a budget: {{'budget': {value!r}}}")
        return one_of("memory level", value, LEVELS)

    @property
    def strongest(self) -> str:
        """The strongest level that a plan for ``budget`` may choose."""
        return self.level if "level" in self.model_fields_set else "slimfit"


MemorySetting = str | Mapping[str, Any] | MemoryOptions | None


def memory_options(setting: MemorySetting) -> MemoryOptions:
    """Options from a level alone (``"slimfit"``), from all of them, or from nothing (off).

    Raises:
        ConfigError: an unknown level or option.
    """
    return options_from(setting, MemoryOptions, "memory")
