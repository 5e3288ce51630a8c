"""Law 4 with a Hugging Face Trainer: killed anywhere and resumed, a run ends as the uninterrupted one, bit for bit.

``FROSTLINE_FAULTS_SEED`` repeats the times of a run of ``make test-faults``; each test prints its own.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.child import CACHED, ROWS, SABOTAGES, STEPS_PER_EPOCH, VARIANTS
from tests.faults.driver import Runs

SEED = int(os.environ.get("FROSTLINE_FAULTS_SEED", time.time_ns() % 1_000_000))
SOME_STEPS = random.Random(0).sample(range(STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH + 7), 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


POINTS = {
    "between-our-state-and-the-trainers-files": ("length-grouped", "before-host-files:20"),
    "between-the-trainers-files": ("best-model", "between-host-files:20"),
    "inside-freezing": ("best-model", "frozen:3"),
    "at-an-epochs-end-and-at-a-step": ("length-grouped", f"epoch_end:{STEPS_PER_EPOCH}", f"step_end:{SOME_STEPS[0]}"),
    "at-a-step": ("length-grouped", f"step_end:{SOME_STEPS[1]}"),
    "after-the-last-step": ("best-model", "train_end:1"),
}


@pytest.mark.parametrize("case", POINTS)
def test_a_killed_run_ends_as_if_it_had_not_been(runs: Runs, case: str) -> None:
    variant, *points = POINTS[case]
    for point in points:
        killed, _ = runs.start(case, variant, point=point)
        assert killed
    runs.start(case, variant)
    assert runs.differences(case, variant) == []


def test_the_run_freezes_early_in_epochs_and_between_checkpoints(runs: Runs) -> None:
    """Or else the tests above would resume nothing: the line moves twice, and not where a checkpoint is."""
    for variant, settings in VARIANTS.items():
        record = json.loads((runs.reference(variant)[0] / "record.json").read_text(encoding="utf-8"))
        moves = [move["step"] for move in record["summary"]["trajectory"]]
        assert len(moves) >= 2, variant
        assert any(step % settings["save_steps"] for step in moves), variant
        assert len(record["log"]) > 10, variant


# What is taken away -> the variant, where it is killed, and what then differs.
NEEDED = {
    "state": ("length-grouped", ["step_end:24"], "weights"),
    "epoch-start": ("length-grouped", ["step_end:24"], "weights"),
    "sums": ("length-grouped", ["step_end:24"], "decisions"),
    "loss": ("length-grouped", ["step_end:24"], "log"),
    "waiting": ("length-grouped", [f"epoch_end:{STEPS_PER_EPOCH}"], "log"),
    "boundary": ("length-grouped", ["step_end:17", "step_end:24"], "weights"),
    "stop": ("best-model", ["train_end:1"], "summary"),
}
SLOW = ("loss", "waiting", "boundary", "stop")


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.faults] if w in SLOW else []) for w in SABOTAGES])
def test_without_what_resume_restores_the_run_ends_differently(runs: Runs, what: str) -> None:
    variant, points, differs = NEEDED[what]
    name = f"without-{what}"
    for point in points:
        runs.start(name, variant, point=point, sabotage=what)
    runs.start(name, variant, sabotage=what)
    assert differs in runs.differences(name, variant)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("variant", "point"),
    [
        ("length-grouped", "before-trainer-state:30"),
        ("length-grouped", "inside-our-state:20"),
        ("length-grouped", "frozen:3"),
        ("length-grouped", "evaluate:15"),
        ("best-model", "before-rotation:16"),
        ("best-model", "inside-our-state:8"),
        ("best-model", "before-host-files:36"),
        ("best-model", "epoch_end:30"),
    ],
)
def test_a_run_killed_inside_saving_or_freezing(runs: Runs, variant: str, point: str) -> None:
    name = f"{variant}-{point}"
    killed, _ = runs.start(name, variant, point=point)
    assert killed
    runs.start(name, variant)
    assert runs.differences(name, variant) == []


def check_cached(runs: Runs, name: str, starts: list[dict[str, Any]]) -> dict[str, int]:
    """A run with records on disk, killed and resumed, against one that was left alone and had no cache (law 3)."""
    for how in starts:
        killed, _ = runs.start(name, "cached", **how)
        assert killed or "seconds" in how
    runs.start(name, "cached")
    moves, loss, weight = runs.apart(name, CACHED["cached"])
    assert moves == []
    assert loss < 1e-3
    assert weight < 1e-3
    record = json.loads((runs.folder / name / "result" / "record.json").read_text(encoding="utf-8"))
    # The clock of a busy machine may say that reading a tiny model's records is slower than computing them.
    assert not [limit for limit in record["summary"]["limits"] if not limit.startswith("not cached at depth")]
    cache: dict[str, int] = record["summary"]["cache"]
    runs.forget(name)
    return cache


@pytest.mark.parametrize(
    "points",
    [["frozen:2"], ["step_end:24"], ["step_end:24", "step_end:33"], ["inside-our-state:30"], ["epoch_end:30"]],
    ids="-".join,
)
def test_a_killed_run_with_records_on_disk_uses_no_wrong_one(runs: Runs, points: list[str]) -> None:
    cache = check_cached(runs, "-".join(["cached", *points]), [{"point": point} for point in points])
    assert cache["hits"] + cache["upgrades"] > ROWS // 2
    if points == ["epoch_end:30"]:  # the line had moved before: what the killed process has written is read by this one
        assert cache["hits"] > 0.9 * ROWS


@pytest.mark.faults
@pytest.mark.parametrize("number", range(45))
def test_a_run_with_records_on_disk_killed_at_any_time(runs: Runs, number: int) -> None:
    draw = random.Random(f"{SEED}:cached:{number}")
    whole = runs.reference(CACHED["cached"])[1]
    starts = [{"seconds": draw.uniform(0.2 * whole, whole)} for _ in range(draw.randint(1, 2))]
    check_cached(runs, f"cached-at-any-time-{number}", starts)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(40))
def test_a_run_killed_at_any_time(runs: Runs, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed once or twice, uniformly in the wall time of the uninterrupted run."""
    draw = random.Random(f"{SEED}:{number}")
    variant = sorted(VARIANTS)[number % len(VARIANTS)]
    name, whole = f"at-any-time-{number}", runs.reference(variant)[1]
    told, killed = [], False
    while not killed:  # on a machine that has become faster the first try may be done before its time
        runs.forget(name)
        killed, seconds = runs.start(name, variant, seconds=draw.uniform(0.0, whole))
    told.append(f"killed after {seconds:.3f} s")
    if draw.random() < 0.5:
        killed, seconds = runs.start(name, variant, seconds=draw.uniform(0.0, whole))
        told.append(f"then {'killed' if killed else 'done'} after {seconds:.3f} s")
    runs.start(name, variant)
    with capsys.disabled():
        print(f"\nFROSTLINE_FAULTS_SEED={SEED}, {number}: {variant} of {whole:.2f} s, {', '.join(told)}", end=" ")
    assert runs.differences(name, variant) == [], f"FROSTLINE_FAULTS_SEED={SEED}"
