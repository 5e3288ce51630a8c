"""What the first rank measured reaches the others as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from frostline.distributed import Agreement, from_first
from frostline.errors import ConfigError

pytestmark = pytest.mark.usefixtures("alone")

LAYERS = ("blocks.0.weight", "blocks.1.weight")


@pytest.mark.parametrize(
    "observed",
    [
        {"scores": None, "changes": None, "interval_steps": 0},
        {"scores": {1: 0.1, 2: math.pi, 3: 0.0}, "changes": None, "interval_steps": 7},
        {"scores": {3: math.inf}, "changes": {}, "interval_steps": 1},
        {"scores": None, "changes": {LAYERS[1]: 1e-300}, "interval_steps": 0},
        {"scores": {}, "changes": dict.fromkeys(LAYERS, 0.0), "interval_steps": 0},
    ],
    ids=str,
)
def test_numbers_arrive_bit_for_bit(observed: dict[str, Any]) -> None:
    assert Agreement(dist.group.WORLD, torch.device("cpu"), 4, LAYERS).on(observed, 1) == observed


def test_what_is_no_number_arrives_as_such() -> None:
    seen = Agreement(dist.group.WORLD, torch.device("cpu"), 4, ()).on(
        {"scores": {2: math.nan}, "changes": None, "interval_steps": 3}, 1
    )
    assert list(seen["scores"]) == [2]
    assert math.isnan(seen["scores"][2])


def test_what_the_first_rank_makes() -> None:
    """Across ranks: ``tests/adapters/test_budget_ranks.py``."""
    made = {"a": [1, 0.1, math.inf, None, "ä"]}
    assert from_first(lambda: made, torch.device("cpu")) == made

    def fails() -> None:
        raise ConfigError("that cannot be")

    with pytest.raises(ConfigError, match="that cannot be"):
        from_first(fails, torch.device("cpu"))
