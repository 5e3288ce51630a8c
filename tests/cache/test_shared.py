"""Records that the ranks of a machine share: each reads what any has written, and no view is ever wrong (law 6)."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from frostline.cache.disk import LOCK, DiskStore
from frostline.cache.ranks import Circle
from frostline.cache.shared import SharedStore
from frostline.cache.slotstore import SlotStore
from tests.cache.records import assert_records, key, prefix, value
from tests.ranks import launch

Open = Callable[..., SlotStore]


@pytest.fixture(params=["memory", "disk"])
def member(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the store of one more rank. Ranks are processes; what they share is by files, so one process will do."""
    words, opened = dist.HashStore(), []

    def open_one(budget: int = 1 << 20, weights: Callable[[int], bytes] = prefix, size: int = 2) -> SlotStore:
        circle = Circle(words, "records", size)
        store: SlotStore
        if request.param == "memory":
            store = SharedStore(budget, prefix=weights, circle=circle)
        else:
            store = DiskStore(tmp_path / "a", budget, prefix=weights, circle=circle)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()
    assert not (tmp_path / "a").exists(), "the last one takes everything away"


def fill(store: SlotStore, numbers: range, depth: int) -> None:
    for number in numbers:
        assert store.put(key(number), depth, value(number, depth))
    store.flush()


def own(store: SlotStore) -> int:
    """Bytes of the files into which a rank puts new records."""
    return sum(os.fstat(file.data).st_size for file in store._own.values())


def test_each_reads_what_the_other_has_written(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(10), 1)
    fill(second, range(10, 20), 1)
    for store in (first, second):
        assert_records(store, 20, 1)
        assert store.records == 20


def test_one_that_comes_later_finds_what_is_there(member: Open) -> None:
    first = member()
    fill(first, range(20), 1)
    assert_records(member(), 20, 1)


def test_an_upgrade_goes_over_the_slot_whoevers_it_is(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(20), 1)
    assert_records(second, 20, 1)
    sizes = own(first), own(second)
    fill(second, range(20), 2)
    assert (own(first), own(second)) == sizes == (sizes[0], 0)
    for store in (first, second):
        assert_records(store, 20, 2)
        assert store.torn == 0


def test_a_record_of_another_size_frees_the_other_ranks_slot(member: Open) -> None:
    first, second = member(budget=1000), member()
    assert first.put(key(0), 1, value(0, 1))
    first.flush()
    assert second.get_many([key(0)])[0] is not None
    small = value(0, 2)[:1]
    assert second.put(key(0), 2, small)
    second.flush()
    assert first.get_many([key(0)])[0] is not None
    size = own(first)
    assert first.put(key(5), 1, value(5, 1))
    first.flush()
    assert own(first) == size, "the slot that the other rank gave up was not used again"
    for store in (first, second):
        for number, expected in ((0, small), (5, value(5, 1))):
            record = store.get_many([key(number)])[0]
            assert record is not None
            assert torch.equal(record.value, expected)


def test_ranks_that_write_the_same_sample_agree_on_one(member: Open) -> None:
    first, second = member(), member()
    for store in (first, second):
        store.put(key(0), 1, value(0, 1))
    first.flush()
    second.flush()
    for _ in range(2):
        for store in (first, second):
            assert_records(store, 1, 1)
    assert first._entries[key(0)].slot == second._entries[key(0)].slot
    assert sum(len(slots) for file in second._own.values() for slots in file._free.values()) == 1
    assert not any(slots for file in first._own.values() for slots in file._free.values())


def test_what_another_rank_has_read_ahead_and_then_written_over_is_read_again(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(20), 1)
    second.expect([key(n) for n in range(20)])
    fill(first, range(20), 2)
    assert_records(second, 20, 2)


def test_a_record_of_a_rank_that_is_a_step_ahead_waits_for_the_line(member: Open) -> None:
    first, second = member(), member()
    second.moved(1)
    first.moved(2)
    fill(first, range(5), 2)
    assert second.get_many([key(0)]) == [None]
    assert second.depths() == set()
    second.moved(2)
    assert_records(second, 5, 2)


def test_what_a_rank_wrote_before_a_thaw_is_not_used_after_it(member: Open) -> None:
    """The other rank hears of it only then, and the weights at that depth have trained since."""
    weights = {1: b"1" * 16, 2: b"2" * 16}
    first, second = member(weights=weights.__getitem__), member(weights=weights.__getitem__)
    for store in (first, second):
        store.moved(2)
    assert second.moved(1) == 0
    fill(first, range(5), 2)  # put before the thaw, written and told after the other rank's
    assert first.moved(1) == 5
    assert second.get_many([key(0)]) == [None]
    weights[2] = b"trained since..."
    for store in (first, second):
        store.moved(2)
        assert store.get_many([key(n) for n in range(5)]) == [None] * 5
        assert store.records == 0


def test_a_thaw_drops_what_the_other_has_written(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(10), 2)
    fill(second, range(10, 15), 1)
    for store in (first, second):
        assert store.get_many([key(0)])[0] is not None
    for store in (first, second):
        assert store.moved(1) == 10
        assert store.depths() == {1}
        assert store.records == 5


def test_a_closed_rank_leaves_its_records(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(20), 1)
    assert_records(second, 20, 1)
    first.close()
    assert_records(second, 20, 1)
    fill(second, range(20), 2)
    assert_records(second, 20, 2)


def test_a_damaged_record_of_another_rank_is_a_miss(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(20), 1)
    assert_records(second, 20, 1)
    slot = second._entries[key(3)].slot
    os.pwrite(first._data[slot.file], b"\0\1\2\3", slot.offset + 150)
    found = second.get_many([key(n) for n in range(20)])
    assert [n for n, record in enumerate(found) if record is None] == [3]
    assert second.torn == 1
    for store in (second, first):  # each notices for itself
        assert store.get_many([key(3)]) == [None]
        assert store.put(key(3), 1, value(3, 1))
        store.flush()
    for store in (first, second):
        assert_records(store, 20, 1)


@pytest.mark.parametrize("seed", range(5))
def test_no_view_is_wrong_while_all_write(seed: int, member: Open) -> None:
    """Three ranks write and read as they come, the same samples too, while the line goes up and comes down.

    What is above the line trains: a record says in its first value how often it had come down before it was made.
    """
    thaws = [0, 0, 0]
    wrong: list[Any] = []
    barrier = threading.Barrier(3)

    def weights(number: int) -> Callable[[int], bytes]:
        return lambda depth: bytes([depth, thaws[number] if depth > 1 else 0]) * 8

    def made(sample: int, depth: int, thaw: int) -> torch.Tensor:
        found = value(sample, depth)
        found[0, 0] = thaw if depth > 1 else 0
        return found

    stores = [member(budget=6000, weights=weights(number), size=3) for number in range(3)]

    def live(number: int) -> None:
        store, generator = stores[number], random.Random(10 * seed + number)
        for depth in (1, 2, 4, 1, 3, 4, 1, 5):
            store.moved(depth)
            if depth == 1:
                thaws[number] += 1
            for _ in range(60):
                samples = [generator.randrange(20) for _ in range(4)]
                if generator.random() < 0.3:
                    store.expect([key(n) for n in samples])
                for n, record in zip(samples, store.get_many([key(n) for n in samples]), strict=True):
                    if record is not None and not torch.equal(record.value, made(n, record.depth, thaws[number])):
                        wrong.append((number, n, record.depth, depth))
                    if record is None or record.depth < depth:
                        store.put(key(n), depth, made(n, depth, thaws[number]))
            # As training does: no rank takes its next step before all have taken this one.
            barrier.wait(60)

    def watched(number: int) -> None:
        try:
            live(number)
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=watched, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for store in stores:
        store.flush()
    for store in stores:
        assert own(store) <= 6000
        assert store.get_many([key(n) for n in range(20)]).count(None) < 20
        assert max(store.depths()) == 5


def test_one_that_clears_alone_gives_no_slot_to_two(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(10), 1)
    assert_records(second, 10, 1)
    first.clear()
    fill(second, range(5), 2)  # over slots that are free, or have been given back, in the other's eyes
    if isinstance(first, DiskStore):
        assert_records(first, 5, 2)
    for _ in range(2):
        fill(first, range(20, 30), 1)
        for store in (first, second):
            for number, record in enumerate(store.get_many([key(n) for n in range(20, 30)]), 20):
                assert record is not None
                assert torch.equal(record.value, value(number, 1))
            for number, record in enumerate(store.get_many([key(n) for n in range(5)])):
                assert record is None or torch.equal(record.value, value(number, 2))
        fill(second, range(5), 2)
    assert_records(second, 5, 2)
    if isinstance(first, DiskStore):
        assert first.torn == second.torn == 0


def test_what_is_told_of_a_slot_that_another_sample_has_by_now_is_not_believed(member: Open) -> None:
    first, second = member(), member()
    fill(first, range(10), 1)
    assert_records(second, 10, 1)
    first.clear()
    fill(second, range(5), 2)
    fill(first, range(20, 30), 1)  # before it has heard of that
    assert first.get_many([key(n) for n in range(5)]) == [None] * 5
    assert first.torn == 0


def test_memory_that_is_cleared_is_given_back() -> None:
    circle = Circle(dist.HashStore(), "records", 2)
    store = SharedStore(5000, prefix=prefix, circle=circle)
    while store.put(key(store.records), 1, value(0, 1)):
        pass
    assert own(store) > 0
    store.clear()
    assert own(store) == 0
    assert store.put(key(0), 1, torch.ones(40, 24))  # of another size
    assert store.get_many([key(0)])[0] is not None
    store.close()


def test_one_that_has_left_before_anybody_looked_is_not_looked_for(member: Open) -> None:
    """The numbers of its open files may be others by then."""
    first, second = member(size=3), member(size=3)
    fill(first, range(5), 1)
    first.close()
    held = [os.memfd_create("in the way") for _ in range(8)]
    assert second.get_many([key(0)]) == [None]
    assert set(second._data) == {1}
    for file in held:
        os.close(file)


def test_files_that_are_others_by_now_are_not_opened(member: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Circle, "leave", lambda self: None)  # killed, say
    first, second = member(), member()
    said: list[str] = []
    monkeypatch.setattr(second._circle, "_limit", lambda code, message: said.append(f"{code}: {message}"))
    first.close()
    held = [os.memfd_create("in the way") for _ in range(8)]
    assert second.get_many([key(0)]) == [None]
    assert set(second._data) == {1}
    (limit,) = said
    assert limit.startswith("cache-shared: records of other ranks cannot be read: FileNotFoundError: ")
    for file in held:
        os.close(file)


def test_a_store_between_ranks_that_has_gone_ends_hearing_and_nothing_else(
    member: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = member(size=3), member(size=3)

    def gone(*_: Any) -> Any:
        raise ConnectionError("rank 0 has left")

    fill(first, range(5), 1)
    monkeypatch.setattr(Circle, "newcomers", gone)
    assert first.moved(3) == 0
    fill(first, range(5), 3)
    assert_records(first, 5, 3)


def test_more_ranks_than_were_said_share_nothing() -> None:
    words = dist.HashStore()
    assert [Circle(words, "records", 2).number for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="3 processes on this machine, and LOCAL_WORLD_SIZE says 2"):
        Circle(words, "records", 2)


def test_a_rank_that_comes_after_the_run_has_gone_stays_out_of_another(tmp_path: Path) -> None:
    words = dist.HashStore()
    first, late = (Circle(words, "one", 2) for _ in range(2))
    DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, circle=first).close()
    with pytest.raises(FileNotFoundError):
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, circle=late)
    other = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, circle=Circle(words, "two", 2))
    fill(other, range(5), 1)
    with pytest.raises(BlockingIOError, match="another run's"):
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, circle=late)
    assert_records(other, 5, 1)
    other.close()
    assert not (tmp_path / "a").exists()


def test_a_folder_that_somebody_has_removed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    fill(store, range(5), 1)
    shutil.rmtree(tmp_path / "a")
    assert_records(store, 5, 1)
    store.close()


def test_files_of_an_earlier_run_are_dealt_out(tmp_path: Path) -> None:
    """Written by three ranks, read by two and by one."""
    words = dist.HashStore()
    stores = [
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, keep=True, circle=Circle(words, "three", 3)) for _ in range(3)
    ]
    for number, store in enumerate(stores):
        fill(store, range(7 * number, 7 * number + 7), 1)
    for store in stores:
        store.close()
    pair = [DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, keep=True, circle=Circle(words, "two", 2)) for _ in "ab"]
    for store in pair:
        assert_records(store, 21, 1)
    for depth, store in enumerate(pair, 2):
        fill(store, range(21), depth)
        for each in pair:
            assert_records(each, 21, depth)
    for store in pair:
        store.close()
    one = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    assert_records(one, 21, 3)
    one.close()
    assert not (tmp_path / "a").exists()


def test_another_run_does_not_come_in_between(tmp_path: Path) -> None:
    words = dist.HashStore()
    first, second = (
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, circle=Circle(words, "one", 2)) for _ in range(2)
    )
    with pytest.raises(BlockingIOError):
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    first.close()
    with pytest.raises(BlockingIOError):
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    assert (tmp_path / "a" / LOCK).is_file()
    second.close()
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two real ranks saw, under DistributedDataParallel."""
    return launch("tests.cache.two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_two_ranks_find_every_sample_again(mode: str, ranks: list[dict[str, Any]]) -> None:
    """Shuffled anew in every epoch: half of a rank's samples were the other's before."""
    for rank in ranks:
        found = rank[mode]
        assert not found["limits"]
        # Epochs at depths 1, 1, 3, 3, 2 (a thaw), 2 of 12 samples a rank.
        names = ("misses", "hits", "upgrades")
        assert [[epoch[name] for name in names] for epoch in found["epochs"]] == [
            [12, 0, 0], [0, 12, 0], [0, 0, 12], [0, 12, 0], [12, 0, 0], [0, 12, 0],
        ]  # fmt: skip
        assert found["losses"] == pytest.approx(rank["off"]["losses"], rel=1e-5)
        assert found["torn"] == 0
    assert ranks[0][mode]["losses"] != ranks[1][mode]["losses"], "both saw the same samples: the test shows nothing"
    assert ranks[0][mode]["weights"] == ranks[1][mode]["weights"]
