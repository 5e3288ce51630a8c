"""What pays is measured on the running job, decided by rank 0, and not measured again after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import frostline.cache.manager as manager
from frostline.cache import CacheOptions
from frostline.cache.cost import Price, seconds_of
from frostline.cache.disk import DiskStore
from frostline.cache.plans import Plan, Plans
from frostline.cache.tiers import Tiers
from tests.cache.runs import BERT, EPOCH, both, flush, pair, train
from tests.cache.sides import SAMPLES, Side
from tests.conftest import Stopwatch

PAYS = Price(computing=1e-3, writing=1e-5, reading=1e-5, nbytes=100)
DOES_NOT = PAYS._replace(computing=5e-6)


@pytest.fixture
def price(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, bool], Price]], list[int]]:
    """Set the price at a depth, in memory and on disk; returns the depths at which it was asked."""

    def fix(of: Callable[[int, bool], Price]) -> list[int]:
        asked: list[int] = []

        def _price(self: manager.CacheManager, passes: Any, call: Any, named: Any, store: Any) -> Price:
            asked.append(self.depth)
            store.close()
            return of(self.depth, isinstance(store, DiskStore))

        monkeypatch.setattr(manager.CacheManager, "_price", _price)
        return asked

    return fix


@pytest.mark.parametrize(
    ("found", "visits", "pays"),
    [
        (PAYS, 1, True),
        (PAYS, math.inf, True),
        (PAYS, 0, False),
        (DOES_NOT, math.inf, False),
        (PAYS._replace(writing=2e-3), 2, False),
        (PAYS._replace(writing=2e-3), 3, True),
        (PAYS._replace(reading=1e-3), math.inf, False),
    ],
)
def test_a_record_pays_if_its_visits_save_more_than_it_costs(found: Price, visits: float, pays: bool) -> None:
    assert found.pays(visits) == pays


def test_the_fastest_of_three_counts_and_preparing_does_not(stopwatch: Stopwatch) -> None:
    takes = iter((3.0, 1.0, 2.0))
    assert seconds_of(lambda: stopwatch.sleep(next(takes)), lambda: stopwatch.sleep(10.0)) == 1.0
    assert stopwatch.now == 36.0


def test_auto_measures_on_the_job_and_caches_what_pays() -> None:
    cached, plain = pair(depth=1, options=CacheOptions(mode="auto"))
    both(cached, plain, EPOCH * 2)
    for side in (cached, plain):
        side.freeze(3)
    both(cached, plain, EPOCH * 2, 6)
    prices = [e for e in cached.events if e["action"] == "price"]
    assert [(p["depth"], p["tier"]) for p in prices] == [(1, "memory"), (3, "memory")]
    for found in prices:
        assert found["keep"] == (found["computing"] > found["reading"])
        assert 0 < found["reading"] < 0.1
        assert found["nbytes"] == 8 * 32 * 4
    if all(p["keep"] for p in prices):
        assert cached.counts()["hits"] == 2 * SAMPLES
        assert cached.counts()["upgrades"] == SAMPLES


def test_what_does_not_pay_is_not_done_until_a_deeper_line_makes_it_pay(price: Any) -> None:
    asked = price(lambda depth, _: PAYS if depth > 1 else DOES_NOT)
    cached, plain = pair(depth=1, options=CacheOptions(mode="auto"))
    assert cached.cache is not None
    both(cached, plain, EPOCH * 2)
    assert not cached.counts()["misses"]
    assert not cached.cache.stopped
    for side in (cached, plain):
        side.freeze(2)
    both(cached, plain, EPOCH * 2, 6)
    assert cached.counts()["hits"] == SAMPLES
    assert asked == [1, 2]


def test_a_resumed_run_does_not_measure_again(price: Any) -> None:
    price(lambda depth, _: DOES_NOT)
    first, _ = pair(options=CacheOptions(mode="auto"))
    train(first, EPOCH)
    assert first.cache is not None
    state = json.loads(json.dumps(first.cache.state_dict()))
    asked = price(lambda depth, _: PAYS)  # the clock would say otherwise today
    again = Side(BERT, cached=True, options=CacheOptions(mode="auto"))
    assert again.cache is not None
    again.cache.load_state_dict(state)
    again.freeze(2)
    train(again, EPOCH * 2)
    assert asked == []
    assert not again.counts()["misses"]
    again.freeze(1)  # a thaw is another matter
    train(again, EPOCH * 2)
    assert asked == [1]
    assert again.counts()["hits"] == SAMPLES


@pytest.mark.parametrize("pays", [True, False])
def test_disk_joins_once_memory_is_full_if_it_pays(pays: bool, price: Any, tmp_path: Path) -> None:
    asked = price(lambda _, disk: PAYS if pays or not disk else DOES_NOT)
    options = CacheOptions(mode="auto", memory=5 * 8 * 32 * 4, folder=tmp_path)
    cached, plain = pair(options=options)
    assert cached.cache is not None
    both(cached, plain, EPOCH * 2)
    assert asked == [2, 2]
    assert isinstance(cached.cache.store, Tiers) == pays
    if pays:
        flush(cached)
    both(cached, plain, EPOCH, 6)
    assert cached.cache.store.records == (SAMPLES if pays else 5)
    assert asked == [2, 2]
    state = cached.cache.state_dict()
    assert state["plans"]["2"] == [True, pays, False]
    cached.cache.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_no_tier(tmp_path: Path) -> None:
    options = CacheOptions(mode="auto", memory=5 * 8 * 32 * 4, disk=100, folder=tmp_path)
    cached, plain = pair(options=options)
    both(cached, plain, EPOCH * 2)
    assert not cached.limits
    told = [e for e in cached.events if e["action"] == "price" and e["tier"] == "disk"]
    assert [(e["reading"], e["disk"]) for e in told] == [(math.inf, False)]


def test_a_resumed_run_opens_the_disk_that_was_found_to_pay(price: Any, tmp_path: Path) -> None:
    asked = price(lambda *_: DOES_NOT)
    options = CacheOptions(mode="auto", memory=5 * 8 * 32 * 4, folder=tmp_path)
    side = Side(BERT, cached=True, options=options)
    assert side.cache is not None
    side.cache.load_state_dict({"stopped": None, "plans": {"2": [True, True, False]}})
    side.freeze(2)
    assert not list(tmp_path.iterdir()), "not before the first batch: the host may load other weights"
    train(side, EPOCH)
    flush(side)
    assert side.cache.store.records == SAMPLES
    assert asked == []
    side.cache.close()


def test_nothing_is_written_in_the_last_epoch() -> None:
    side = Side(BERT, cached=True, epochs=2)
    plain = Side(BERT, cached=False)
    for one in (side, plain):
        one.freeze(1)
    both(side, plain, EPOCH)
    for one in (side, plain):
        one.freeze(3)
    both(side, plain, EPOCH, 3)
    assert (side.counts()["written"], side.counts()["upgrades"]) == (SAMPLES, SAMPLES)
    assert side.cache is not None
    assert side.cache.store.depths() == {1}


class Ranks:
    """Stands for a process group of two, each of which is asked in turn; the store between them is a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = 0
        store = dist.HashStore()
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def plans(self) -> tuple[Plans, Plans]:
        found = Plans(), Plans()
        found[1].run = found[0].run  # in another process it would have the same number
        return found


def test_what_a_rank_measures_holds_only_if_rank_0_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    first, other = ranks.plans()
    ranks.rank = 1
    assert not other.propose(2, Plan(keep=False))
    assert other.awaits(2)
    assert other.of(2) is None
    heard = []
    for step in range(1, 49):
        if step == 20:
            ranks.rank = 0
            assert first.propose(2, Plan(keep=True))
            assert first.propose(2, Plan(keep=True, disk=True))
            assert not first.agree()
            ranks.rank = 1
        if other.agree():
            heard.append(step)
    assert heard == [32]
    assert first.of(2) == other.of(2) == Plan(keep=True, disk=True)
    assert not other.awaits(2)
    again = Plans()
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert again.of(2) == other.of(2)


def test_ranks_cache_until_rank_0_says_otherwise(monkeypatch: pytest.MonkeyPatch, price: Any) -> None:
    price(lambda depth, _: DOES_NOT)
    ranks = Ranks(monkeypatch)
    first, other = ranks.plans()
    ranks.rank = 1
    cached, plain = pair(options=CacheOptions(mode="auto"))
    assert cached.cache is not None
    cached.cache._plans = other
    both(cached, plain, EPOCH * 2)
    assert cached.counts()["hits"] == SAMPLES
    ranks.rank = 0
    first.propose(2, Plan(keep=False))
    ranks.rank = 1
    for _ in range(16):
        cached.cache.agree()
    both(cached, plain, EPOCH, 6)
    assert cached.counts()["hits"] == SAMPLES
    assert cached.cache.store.records == 0


def test_a_rank_prices_the_disk_once_and_waits(monkeypatch: pytest.MonkeyPatch, price: Any, tmp_path: Path) -> None:
    ranks = Ranks(monkeypatch)
    first, other = ranks.plans()
    asked = price(lambda *_: PAYS)
    cached, plain = pair(options=CacheOptions(mode="auto", memory=5 * 8 * 32 * 4, folder=tmp_path))
    assert cached.cache is not None
    cached.cache._plans = other
    assert first.propose(2, Plan(keep=True))
    ranks.rank = 1
    for _ in range(16):
        cached.cache.agree()
    both(cached, plain, EPOCH * 4)
    assert asked == [2]
    assert not list(tmp_path.iterdir())


def test_a_rank_that_cannot_hear_rank_0_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    ranks.rank = 1

    def gone() -> Any:
        raise ConnectionError("rank 0 has left")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    cached, plain = pair()
    assert cached.cache is not None
    both(cached, plain, EPOCH * 2)
    for _ in range(40):
        cached.cache.agree()
    assert cached.limits == [
        "cache-shared: each rank keeps records of its own: ConnectionError: rank 0 has left",
        "cache-ranks: rank 0's measurements cannot be heard: ConnectionError: rank 0 has left",
    ]
    both(cached, plain, EPOCH, 6)
    assert cached.counts()["hits"] == 2 * SAMPLES
