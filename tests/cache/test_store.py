"""Records in host memory: within the budget, in place where they fit, whole or not there."""

from __future__ import annotations

import torch

from frostline.cache.store import MemoryStore

KIB = 1024


def value(kib: int, fill: float) -> torch.Tensor:
    return torch.full((kib, KIB // 4), fill)


def test_gives_back_what_was_put() -> None:
    store = MemoryStore(64 * KIB)
    kept = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert store.put(b"a", 2, kept)
    kept_copy = kept.clone()
    kept.zero_()  # the store has its own copy
    record = store.get_many([b"a"])[0]
    assert record is not None
    assert (record.depth, record.value.dtype) == (2, torch.bfloat16)
    assert torch.equal(record.value, kept_copy)
    assert store.get_many([b"b"])[0] is None


def test_an_upgrade_takes_its_slot_in_place() -> None:
    """The budget holds four records: without reuse the fifth write would find no room."""
    store = MemoryStore(16 * KIB)
    keys = [bytes([i]) for i in range(4)]
    for depth in range(1, 4):
        for number, key in enumerate(keys):
            assert store.put(key, depth, value(4, 10.0 * depth + number))
    assert not store.put(b"new", 1, value(4, 0.0))
    assert (store.records, store.nbytes) == (4, 16 * KIB)
    for number, key in enumerate(keys):
        record = store.get_many([key])[0]
        assert record is not None
        assert record.depth == 3
        assert torch.equal(record.value, value(4, 30.0 + number))


def test_a_record_of_another_size_frees_its_slot_for_others() -> None:
    store = MemoryStore(8 * KIB)
    assert store.put(b"a", 1, value(4, 1.0))
    assert store.put(b"a", 2, value(2, 2.0))
    assert store.nbytes == 2 * KIB
    assert store.put(b"b", 1, value(4, 3.0))
    record = store.get_many([b"a"])[0]
    assert record is not None
    assert torch.equal(record.value, value(2, 2.0))


def test_a_record_that_finds_no_room_is_not_there_at_all() -> None:
    store = MemoryStore(4 * KIB)
    assert store.put(b"a", 1, value(4, 1.0))
    assert not store.put(b"a", 2, value(8, 2.0))
    assert store.get_many([b"a"])[0] is None
    assert store.nbytes == 0


def test_a_thaw_forgets_what_is_deeper() -> None:
    store = MemoryStore(64 * KIB)
    for depth in (1, 2, 3):
        store.put(bytes([depth]), depth, value(1, float(depth)))
    assert store.moved(1) == 2
    assert store.get_many([b"\x01"])[0] is not None
    assert store.get_many([b"\x02"])[0] is None
    assert (store.records, store.nbytes) == (1, KIB)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    store = MemoryStore(0)
    assert not store.put(b"a", 1, value(1, 1.0))
    assert store.records == store.nbytes == 0


def test_clear_gives_the_space_back() -> None:
    store = MemoryStore(4 * KIB)
    store.put(b"a", 1, value(4, 1.0))
    store.clear()
    assert store.records == store.nbytes == 0
    assert store.put(b"b", 1, value(4, 2.0))
