"""What a user may say of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from frostline.cache.codecs import CODECS
from frostline.settings import Bytes, one_of, options_from, options_in

__all__ = ["MODES", "CacheOptions", "CacheSetting", "cache_options"]

MODES = ("off", "auto", "memory", "disk")


class CacheOptions(BaseModel):
    """How boundary activations are kept.

    ``mode``: ``off``; ``memory`` (host memory); ``disk`` (host memory, and a folder for what does not fit there);
    ``auto`` (what pays: at each depth the running job is measured, and nothing, memory, or memory and disk used).
    ``memory`` and ``disk`` are budgets of each process in bytes (or "2GB"; default: half of what is free, by those that
    share it), ``folder`` is where records on disk go (default: the user's cache), ``keep`` leaves them there when the
    run ends. ``device`` is a budget in the memory of the GPU, used before the host's (default: none, because nobody
    knows what training will ask for later; with several ranks none is used). ``codec``: ``raw``; ``bf16``, ``fp16`` or
    ``int8`` (one scale a token) take a half to a quarter of fp32's bytes and lose precision.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: str = "off"
    device: Bytes = Field(default=ByteSize(0), ge=0)
    memory: Bytes | None = Field(default=None, ge=0)
    disk: Bytes | None = Field(default=None, ge=0)
    folder: Path | None = None
    keep: bool = False
    codec: str = "raw"

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        return options_in(value, cls, "mode", MODES)

    @field_validator("mode", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> str:
        return one_of("cache mode", value, MODES)

    @field_validator("codec")
    @classmethod
    def _is_codec(cls, value: str) -> str:
        return one_of("codec", value, tuple(CODECS))


CacheSetting = str | Mapping[str, Any] | CacheOptions | None


def cache_options(setting: CacheSetting) -> CacheOptions:
    """Options from a mode alone (``"memory"``), from all of them, or from nothing (off).

    Raises:
        ConfigError: an unknown mode or option, a budget that is none.
    """
    return options_from(setting, CacheOptions, "cache")
