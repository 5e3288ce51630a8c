"""``benchmarks/ways.py``: the ways that ours is measured against do what they are said to do."""

from __future__ import annotations

from unittest import mock

import pytest
from benchmarks.table import ways
from benchmarks.ways import WAYS, Latching, compare

from tests.cache.runs import BERT, EPOCH, train
from tests.cache.sides import SAMPLES, Side


def side_with(manager: type) -> Side:
    with mock.patch("tests.cache.sides.CacheManager", manager):
        side = Side(BERT, cached=True, epochs=4)
    side.freeze(1)
    for epoch in range(3):
        for number, rows in enumerate(EPOCH):
            train(side, [rows], 10 * epoch + number)
            assert side.cache is not None
            side.cache.agree()
            if (epoch, number) == (1, 0):
                side.freeze(3)
    return side


@pytest.mark.parametrize(
    ("way", "misses", "upgrades", "hits"),
    [
        ("ours", SAMPLES, SAMPLES, SAMPLES),  # after the move two batches are upgraded, the first one in its next epoch
        ("latching", SAMPLES, SAMPLES, SAMPLES),  # the second epoch is read at depth 1, the third is upgraded
        ("anew", 2 * SAMPLES, 0, SAMPLES),
    ],
)
def test_what_each_way_computes(way: str, misses: int, upgrades: int, hits: int) -> None:
    manager = WAYS[way]
    assert manager is not None
    side = side_with(manager)
    counts = side.counts()
    assert (counts["misses"], counts["upgrades"], counts["hits"]) == (misses, upgrades, hits)


def test_a_latched_depth_holds_until_the_epoch_ends() -> None:
    side = side_with(Latching)
    assert side.cache is not None
    assert side.cache.depth == 3
    assert side.cache.store.depths() == {3}


def test_runs_are_compared_with_the_uncached_one_of_their_seed() -> None:
    cache = {"misses": 1, "upgrades": 2, "hits": 3, "written": 4}
    plain = {"seed": 0, "way": "uncached", "train_seconds": 10.0, "trajectory": [], "right": [5, 9], "right_of_test": 7}
    ours = {**plain, "way": "ours", "train_seconds": 5.0, "right": [4, 9], "right_of_test": 9, "cache": cache}
    found = compare([ours, plain, {**ours, "seed": 1}])
    assert set(found) == {"ours"}
    assert found["ours"]["speedup_over_uncached"]["median"] == 2.0
    assert found["ours"]["same_trajectory"]
    assert found["ours"]["items_apart_per_epoch"] == [[1, 0]]
    assert found["ours"]["test_items_apart"] == [2]
    machine = {"processor": "a processor", "threads": 1, "packages": {"torch": "1"}}
    table = "\n".join(ways({"comparison": found, "environment": machine, "date": "today", "command": "make"}))
    assert "| ours | 2.00x | 1 | 2 | 3 | 1, 0 | 2 |" in table
