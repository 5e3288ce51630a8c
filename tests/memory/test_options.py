"""What a user may say of memory, and what is said of mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frostline.errors import ConfigError
from frostline.memory import MemoryOptions, memory_options


@pytest.mark.parametrize("setting", [None, False, "off", {}, {"level": False}, {"budget": None}])
def test_off(setting: Any) -> None:
    assert memory_options(setting) == MemoryOptions()


def test_a_level_alone_or_everything() -> None:
    assert memory_options("slimfit") == MemoryOptions(level="slimfit")
    whole = memory_options({"level": "max", "budget": "6GiB"})
    assert (whole.level, whole.budget, whole.strongest) == ("max", 6 * 2**30, "max")
    assert memory_options({"budget": 5}).strongest == "slimfit"
    assert memory_options(whole) is whole


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        (6 * 2**30, 6 * 2**30),
        (0.9 * 6 * 2**30, 5_798_205_850),
        (np.int64(5), 5),
        ("500", 500),
        (" 6 gib ", 6 * 2**30),
        ("1.5GB", 1_500_000_000),
        (".5 k", 500),
    ],
)
def test_sizes(budget: Any, found: int) -> None:
    assert memory_options({"budget": budget}).budget == found


@pytest.mark.parametrize(
    "budget",
    [-1, "-1", "lots", "50%", "5.GB", "1GB/s", "8Gbit", True, [1], float("nan"), float("inf"), 10**30, "9" * 400],
)
def test_what_is_no_size(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be bytes, or a number with KB, MB, GB, KiB, MiB or GiB") as caught:
        memory_options({"budget": budget})
    assert f"memory, budget={budget!r}: " in str(caught.value)


@pytest.mark.parametrize("setting", [True, 0, 8 * 2**30, ["slimfit"]])
def test_what_is_neither_a_word_nor_options(setting: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        memory_options(setting)
    assert str(caught.value) == (
        "memory: must be a level (off, safe, slimfit, published, max) or a mapping of options (level, budget), "
        f"not {setting!r}"
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slimft", ["unknown memory level 'slimft'", "did you mean 'slimfit'", "Valid choices: max, off"]),
        ("6GiB", ["level='6GiB'", "one of off, safe, slimfit", "{'budget': '6GiB'}"]),
        ({"level": ["x"]}, ["unknown memory level \"['x']\"", "Valid choices: max, off"]),
        ({"bugdet": 5}, ["unknown option of memory 'bugdet'", "did you mean 'budget'"]),
        ({"budget": 0}, ["budget=0", "greater than 0"]),
        ({1: 2}, ["should be strings"]),
    ],
)
def test_mistakes(setting: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        memory_options(setting)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
