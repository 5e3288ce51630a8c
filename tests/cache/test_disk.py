"""The disk tier: in place, within its budget, and no wrong record whatever happens to its files (law 6)."""

from __future__ import annotations

import random
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from frostline.cache.disk import DiskStore
from tests.cache.records import assert_records, filled, key, prefix, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gives_back_what_was_put(dtype: torch.dtype, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    kept = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = kept.clone()
    assert store.put(key(0), 3, given)
    given.zero_()  # the store has its own copy, written or not
    store.flush()
    missing, record = store.get_many([key(1), key(0)])
    assert missing is None
    assert record is not None
    assert record.depth == 3
    assert record.value.dtype == dtype
    assert torch.equal(record.value, kept)
    store.close()


def test_an_upgrade_takes_its_slot_in_place(tmp_path: Path) -> None:
    store = filled(tmp_path / "a")
    size = (tmp_path / "a" / "slots.bin").stat().st_size
    for depth in (2, 3):
        for number in range(20):
            store.put(key(number), depth, value(number, depth))
        store.flush()
        assert_records(store, 20, depth)
    assert (tmp_path / "a" / "slots.bin").stat().st_size == size
    store.close()


def test_the_budget_holds_and_what_is_over_it_is_refused(tmp_path: Path) -> None:
    """At once, so that another tier may take it."""
    store = DiskStore(tmp_path / "a", 2500, prefix=prefix)
    taken = [store.put(key(number), 1, value(number, 1)) for number in range(20)]
    store.flush()
    assert 0 < store.records == sum(taken) < 20
    assert store.lost == 0
    assert (tmp_path / "a" / "slots.bin").stat().st_size <= 2500
    store.close()


def test_a_thaw_frees_slots_for_others(tmp_path: Path) -> None:
    store = filled(tmp_path / "a", 10, depth=1)
    size = (tmp_path / "a" / "slots.bin").stat().st_size
    for number in range(10):
        store.put(key(number), 2 + number % 2, value(number, 2 + number % 2))
    assert store.moved(2) == 5
    for number in range(100, 105):
        store.put(key(number), 1, value(number - 99, 1))
    store.flush()
    assert store.records == 10
    assert (tmp_path / "a" / "slots.bin").stat().st_size == size
    store.close()


def test_nobody_else_can_read_it_and_nothing_is_left(tmp_path: Path) -> None:
    store = filled(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    for file in (tmp_path / "a").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store.close()
    assert not (tmp_path / "a").exists()


def test_kept_records_are_found_again(tmp_path: Path) -> None:
    filled(tmp_path / "a", keep=True).close()
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    assert store.records == 20
    assert_records(store, 20, 1)
    store.put(key(50), 1, value(50, 1))
    store.flush()
    assert_records(store, 20, 1)
    store.close()


def test_records_of_other_weights_are_not(tmp_path: Path) -> None:
    filled(tmp_path / "a", keep=True).close()
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=lambda depth: b"other weights...")
    assert store.records == 0
    assert store.get_many([key(3)]) == [None]
    store.close()


def test_a_failing_writer_neither_hangs_nor_leaves_anything(tmp_path: Path) -> None:
    def fails(depth: int) -> bytes:
        raise TypeError("weights of a kind that cannot be hashed")

    store = DiskStore(tmp_path / "a", 1 << 20, prefix=fails)
    for number in range(5):
        store.put(key(number), 1, value(number, 1))
    store.flush()
    store.cool()
    assert store.records == 0
    assert store.lost > 0
    store.close()
    store.close()
    assert not (tmp_path / "a").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "a")
    with pytest.raises(BlockingIOError):
        DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    assert_records(store, 20, 1)
    store.close()


def damage(folder: Path, kind: str, generator: random.Random) -> None:
    file = folder / ("slots.idx" if kind == "flip-index" else "slots.bin")
    content = bytearray(file.read_bytes())
    if kind.startswith("flip"):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif kind == "truncate":
        del content[generator.randrange(len(content)) :]
    else:  # a slot as a run with other weights left it: sound, of the same sample and depth, and wrong
        other = DiskStore(folder.parent / "other", 1 << 20, prefix=lambda _: b"of other weights", keep=True)
        other.put(key(0), 1, value(0, 2))
        other.close()
        earlier = (folder.parent / "other" / "slots.bin").read_bytes()
        content[: len(earlier)] = earlier
    file.write_bytes(content)


def check_damage(folder: Path, kind: str, seed: int, times: int) -> int:
    """Damage a folder ``times`` times; no record may be wrong. Returns how many were noticed as missing."""
    generator = random.Random(seed)
    filled(folder, keep=True).close()
    sound = {file: file.read_bytes() for file in folder.iterdir()}
    missing = 0
    for _ in range(times):
        for file, content in sound.items():
            file.write_bytes(content)
        damage(folder, kind, generator)
        store = DiskStore(folder, 1 << 20, prefix=prefix, keep=True)
        found = store.get_many([key(n) for n in range(20)])
        for number, record in enumerate(found):
            assert record is None or torch.equal(record.value, value(number, 1))
        assert kind != "flip" or found.count(None) <= 1
        missing += found.count(None)
        store.close()
    for file, content in sound.items():
        file.write_bytes(content)
    store = DiskStore(folder, 1 << 20, prefix=prefix)
    assert_records(store, 20, 1)  # without the damage every record is used
    store.close()
    return missing


KINDS = ("flip", "flip-index", "truncate", "stale")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    assert check_damage(tmp_path / "a", kind, seed=0, times=5) > 0


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed_500_times(kind: str, tmp_path: Path) -> None:
    # A flip in the padding of a slot or behind the header's fields hurts nobody; the others each cost a record.
    assert check_damage(tmp_path / "a", kind, seed=1, times=500) > 250


def test_swapped_slots_are_never_used(tmp_path: Path) -> None:
    """While the store is open, so that its index still believes in the old places."""
    store = filled(tmp_path / "a")
    data = tmp_path / "a" / "slots.bin"
    content = data.read_bytes()
    size = next(e.slot.size for e in store._entries.values())
    same = [e.slot.offset for e in store._entries.values() if e.slot.size == size]
    with data.open("r+b") as file:
        for here, there in zip(same, same[1:] + same[:1], strict=True):
            file.seek(here)
            file.write(content[there : there + size])
    found = store.get_many([key(n) for n in range(20)])
    assert found.count(None) == len(same) == store.torn
    for number, record in enumerate(found):
        assert record is None or torch.equal(record.value, value(number, 1))
    store.close()


CHILD = """
    import sys
    from pathlib import Path
    from frostline.cache.disk import DiskStore
    from tests.cache.records import key, prefix, value
    store = DiskStore(Path(sys.argv[1]), 1 << 24, prefix=prefix)
    print("open", flush=True)
    depth = 1
    while True:
        for number in range(200):
            store.put(key(number), depth, value(number, depth))
        depth = depth % 5 + 1
"""


def check_kill(folder: Path, seed: int) -> None:
    """SIGKILL at a random moment of writing and writing over; then every record is right or not there."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder)], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    time.sleep(random.Random(seed).uniform(0.0, 0.3))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = DiskStore(folder, 1 << 24, prefix=prefix)
    for number, record in enumerate(store.get_many([key(n) for n in range(200)])):
        assert record is None or torch.equal(record.value, value(number, record.depth))
    for number in range(200):
        store.put(key(number), 5, value(number, 5))
    store.flush()
    assert_records(store, 200, 5)
    store.close()


@pytest.mark.parametrize("seed", range(5))
def test_killed_while_writing(seed: int, tmp_path: Path) -> None:
    check_kill(tmp_path / "a", seed)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5, 55))
def test_killed_while_writing_50_times(seed: int, tmp_path: Path) -> None:
    check_kill(tmp_path / "a", seed)


def test_a_full_disk_ends_writing_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in its middle."""
    store = filled(tmp_path / "a", 5)
    size = (tmp_path / "a" / "slots.bin").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))
        for number in range(5, 20):
            store.put(key(number), 1, value(number, 1))
        store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.lost > 0
    assert not store.put(key(30), 1, value(30, 1))
    assert_records(store, 5, 1)
    for number, record in enumerate(store.get_many([key(n) for n in range(20)])):
        assert record is None or torch.equal(record.value, value(number, 1))
    store.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        DiskStore(tmp_path / "file" / "a", 1 << 20, prefix=prefix)


def test_a_queue_that_is_full_skips_and_does_not_wait(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix, queued=2000)
    taken = 0
    for number in range(500):
        taken += store.put(key(number), 1, value(number, 1))
    store.flush()
    assert store.records == taken
    store.close()
