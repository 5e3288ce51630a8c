"""What a user may say of the cache, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline.cache import CacheOptions, cache_options
from frostline.errors import ConfigError


def test_a_mode_alone_or_everything_or_nothing() -> None:
    assert cache_options("memory") == CacheOptions(mode="memory")
    whole = cache_options({"mode": "disk", "memory": "2GB", "disk": 1000, "folder": "there", "keep": True})
    assert (whole.memory, whole.disk, whole.folder, whole.keep) == (2_000_000_000, 1000, Path("there"), True)
    assert cache_options(whole) is whole
    assert cache_options(None) == cache_options(False) == CacheOptions()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dsk", ["unknown cache mode 'dsk'", "did you mean 'disk'", "disk, memory, off"]),
        ({"mode": "memory", "budget": 3}, ["unknown option of cache 'budget'", "folder"]),
        ({"mode": "memory", "memory": -1}, ["memory=-1: must be bytes, or a number with KB"]),
        ({"mode": "memory", "memory": "much"}, ["memory='much'"]),
        ({"mode": ["disk"]}, ["unknown cache mode", "disk, memory, off"]),
        (True, ["must be a mode (off, auto, memory, disk) or a mapping of options (mode, device", "not True"]),
    ],
)
def test_mistakes(setting: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_options(setting)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
