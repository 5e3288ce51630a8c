"""Law 5 under a real DistributedDataParallel: two processes, gloo, the Trainer's own default of unused parameters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.hosts import batches, bert, plain_sums
from tests.adapters.two_ranks import CASES, RATE
from tests.ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw; each checks law 1 at every step by itself."""
    return launch("tests.adapters.two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["decisions"], "nothing was decided: the test shows nothing"
    assert max(first["frozen"]) > 0, "nothing froze: the test shows nothing"
    assert first == second, "decisions, the numbers behind them, frozen sets or weights differ between the ranks"
    assert first["samples"] == 128, "samples count all ranks"
    if name != "random-blocks":
        assert first["trajectory"][-1]["depth"] > 0


@pytest.mark.parametrize("name", ["ramp-cached", "interlayer-cached"])
def test_ranks_read_records(name: str, ranks: list[dict[str, Any]]) -> None:
    """Each rank sees the same rows in both epochs here; DDP runs the blocks that are left."""
    for rank in ranks:
        assert rank[name]["read"] > 0
        assert not rank[name]["limits"]


def test_layers_that_take_turns_with_and_without_records(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(set(rank["interlayer"]["frozen"])) > 1
        assert rank["interlayer"]["kept"] > 0
        assert rank["interlayer"]["trajectory"] == rank["interlayer-cached"]["trajectory"]


def test_gradients_of_resting_layers_are_sent_all_the_same(ranks: list[dict[str, Any]]) -> None:
    """DDP's buckets are made once: what rests at a step travels as zeros. Stated in the README; no bytes are saved."""
    for rank in ranks:
        whole = sum(p.numel() * p.element_size() for p in bert().parameters())
        assert rank["sent"]["none"] == [whole] * 6
        assert rank["sent"]["interlayer"] == [whole] * 6


def test_statistic_is_that_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    """Two ranks with 4 rows each count as one batch of 8: the reduced gradient, not the local one."""
    expected = plain_sums(bert(), [[b] for b in batches(8)[:2]], RATE)
    scores = ranks[0]["gradient-norm"]["decisions"][0]["observation"]["scores"]
    assert {int(k): v for k, v in scores.items()} == pytest.approx(expected, rel=1e-4)


def test_ranks_refuse_what_cannot_work(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["refused"]) == 2
        assert all("ddp_find_unused_parameters=True" in message for message in rank["refused"])
