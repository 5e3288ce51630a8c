"""Law 6 with records on disk: folders, budgets and disks that are full cost the cache and not the run."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from frostline.cache import CacheOptions
from frostline.cache.disk import DiskStore
from frostline.cache.tiers import Tiers
from tests.cache.runs import BERT, BY_NAME, EPOCH, both, flush, hooks, on_disk, pair, train
from tests.cache.sides import ROWS, SAMPLES, Side
from tests.ranks import ROOT


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "convnext", "t5", "resnet"])
def test_records_on_disk(architecture: str, tmp_path: Path) -> None:
    """Written at depth 1, upgraded to 3, read back; nothing is left at the end."""
    cached, plain = pair(BY_NAME[architecture], depth=1, options=on_disk(tmp_path / "cache"))
    assert cached.cache is not None
    for start, depth in ((0, 1), (3, 3), (6, 3)):
        for side in (cached, plain):
            side.freeze(depth)
        both(cached, plain, EPOCH, start)
        flush(cached)
    counts = cached.counts()
    assert (counts["misses"], counts["upgrades"], counts["hits"]) == (SAMPLES, SAMPLES, SAMPLES)
    (folder,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in folder.iterdir()} == {"lock", "manifest.json", "slots.bin", "slots.idx"}
    assert json.loads((folder / "manifest.json").read_text())["model"] == type(cached.model).__name__
    cached.cache.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_memory_cannot_hold_goes_to_disk(tmp_path: Path) -> None:
    size = torch.empty(8, 32).nbytes
    cached, plain = pair(options=on_disk(tmp_path, memory=5 * size))
    both(cached, plain, EPOCH)
    flush(cached)
    both(cached, plain, EPOCH, 3)
    assert cached.cache is not None
    assert isinstance(cached.cache.store, Tiers)
    in_memory, on = (tier.records for tier in cached.cache.store.tiers)
    assert in_memory + on == SAMPLES
    assert 5 <= in_memory <= 6
    assert cached.counts()["hits"] == SAMPLES
    cached.cache.close()


def test_a_folder_that_cannot_be_made_costs_the_disk_tier_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cached, plain = pair(options=on_disk(tmp_path / "file" / "cache", memory=1 << 20))
    both(cached, plain, EPOCH * 2)
    assert cached.counts()["hits"] == SAMPLES
    (limit,) = cached.limits
    assert limit.startswith("cache-disk: no boundary activations on disk, only in memory: ")


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    first, plain = pair(options=on_disk(tmp_path))
    second, _ = pair(options=on_disk(tmp_path))
    expected = train(plain, EPOCH * 2)
    losses = [train(side, EPOCH) for side in (first, second)]
    assert len(list(tmp_path.iterdir())) == 2
    for side, before in zip((first, second), losses, strict=True):
        flush(side)
        assert before + train(side, EPOCH, 3) == pytest.approx(expected, rel=1e-5)
        assert side.counts()["hits"] == SAMPLES
        assert side.cache is not None
        side.cache.close()


@pytest.mark.parametrize("same", [True, False])
def test_kept_records_serve_a_later_run_of_the_same_weights(same: bool, tmp_path: Path) -> None:
    """After a kill, say: the model comes back from its checkpoint, and so do the records, if it is the same."""
    first, _ = pair(options=on_disk(tmp_path, keep=True))
    train(first, EPOCH)
    assert first.cache is not None
    first.cache.close()
    second = Side(BERT, cached=True, options=on_disk(tmp_path, keep=True))
    plain = Side(BERT, cached=False)
    for side in (second, plain):
        if not same:
            with torch.no_grad():
                side.model.bert.embeddings.word_embeddings.weight[5] += 0.01
        side.freeze(2)
    both(second, plain, EPOCH)
    assert second.counts()["hits"] == (SAMPLES if same else 0)
    assert second.cache is not None
    second.cache.close()


@pytest.mark.parametrize("mode", ["memory", "disk", "auto"])
def test_no_room_for_a_single_record_is_said(mode: str, tmp_path: Path) -> None:
    cached, plain = pair(options=CacheOptions(mode=mode, memory=0, disk=0, folder=tmp_path))
    both(cached, plain, EPOCH * 3)
    assert "cache-no-room: caching stopped: the budgets have no room for a single record" in cached.limits
    assert not list(tmp_path.iterdir())
    assert hooks(cached) == hooks(plain)


def test_a_disk_that_is_full_is_said_and_what_is_there_is_used(tmp_path: Path) -> None:
    cached, plain = pair(options=on_disk(tmp_path))
    both(cached, plain, EPOCH[:2])
    flush(cached)
    (data,) = tmp_path.glob("*/slots.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (data.stat().st_size + 100, hard))
        both(cached, plain, EPOCH[2:], 2)
        flush(cached)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    both(cached, plain, EPOCH, 3)
    (limit,) = set(cached.limits)
    assert limit.startswith("cache-writing: no more boundary activations are written: ")
    assert "File too large" in limit
    assert cached.counts()["hits"] == 2 * ROWS
    assert cached.cache is not None
    assert cached.cache.summary()["lost"] > 0
    cached.cache.close()


def test_kept_records_of_a_deeper_line_are_not_taken_over(tmp_path: Path) -> None:
    """Today their blocks have the weights they were made under; until the line comes down to them they train on."""
    first, _ = pair(options=on_disk(tmp_path, keep=True), depth=3)
    train(first, EPOCH)
    assert first.cache is not None
    first.cache.close()
    second, plain = pair(options=on_disk(tmp_path, keep=True), depth=1)
    both(second, plain, EPOCH[:1])
    for side in (second, plain):
        side.freeze(3)
    both(second, plain, EPOCH, 1)
    assert second.counts()["hits"] == 0
    flush(second)
    both(second, plain, EPOCH, 4)
    assert second.counts()["hits"] == SAMPLES
    assert second.cache is not None
    second.cache.close()
    # And what it has kept is labelled with the weights of now, not with those of the beginning.
    third, _ = pair(options=on_disk(tmp_path, keep=True), depth=3)
    train(third, EPOCH)
    assert third.counts()["hits"] == 0
    assert third.cache is not None
    third.cache.close()


CHILD = """
    import json, sys
    from pathlib import Path
    from tests.cache.runs import EPOCH, both, flush, on_disk, pair
    cached, plain = pair(options=on_disk(Path(sys.argv[1]), disk=1 << 30))
    for start in (0, 3, 6):
        both(cached, plain, EPOCH, start)
        flush(cached)
    print(json.dumps([cached.limits, cached.cache.summary()]))
    cached.cache.close()
"""


def test_a_tmpfs_that_is_full(tmp_path: Path) -> None:
    """A real one, of five pages, in a mount namespace of its own; the budget believes in more."""
    mount = f"mount -t tmpfs -o size=20k,mode=700 none {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    run = shlex.join([sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)])
    child = subprocess.run([*command, f"{mount} && {run}"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-2000:]
    limits, summary = json.loads(child.stdout.splitlines()[-1])
    (limit,) = set(limits)
    assert limit.startswith("cache-writing: no more boundary activations are written: ")
    assert "No space left on device" in limit
    assert 0 < summary["records"] < SAMPLES
    assert summary["hits"] == 2 * summary["records"]


@pytest.mark.parametrize("sized", [True, False])
def test_writing_that_does_not_keep_up_is_no_lack_of_room(sized: bool, tmp_path: Path) -> None:
    """A first batch that is larger than what may wait: the rest of it is skipped, and caching goes on."""
    begin = threading.Event()

    def digest(depth: int) -> bytes:
        assert begin.wait(60)
        return bytes([depth]) * 16

    disk = DiskStore(tmp_path / "a", 1 << 20, prefix=digest, queued=1)
    cached, plain = pair(store=disk, sized=sized)
    both(cached, plain, EPOCH)
    assert (cached.counts()["written"], cached.counts()["full"]) == (1, SAMPLES - 1)
    assert not cached.limits
    begin.set()
    for start in (3, 6):
        disk.flush()
        both(cached, plain, EPOCH, start)
    assert cached.counts()["hits"] > 0
    assert not cached.limits
    disk.close()


def test_a_record_damaged_while_the_run_goes_on_is_computed_again(tmp_path: Path) -> None:
    cached, plain = pair(options=on_disk(tmp_path))
    both(cached, plain, EPOCH)
    flush(cached)
    (data,) = tmp_path.glob("*/slots.bin")
    content = bytearray(data.read_bytes())
    content[200] ^= 4
    data.write_bytes(content)
    both(cached, plain, EPOCH, 3)
    assert cached.cache is not None
    assert cached.cache.summary()["torn"] == 1
    assert cached.counts()["hits"] == SAMPLES - 1
    cached.cache.close()
