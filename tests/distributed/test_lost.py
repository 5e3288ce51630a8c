"""A rank that hangs ends the run of the others by the time-out of the process group, and they say what they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.lost_ranks import FOR_EVER
from tests.ranks import launch, start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """With which error each loop ended on each of two ranks."""
    return launch("tests.distributed.lost_ranks", tmp_path_factory.mktemp("loops"))


def test_a_rank_that_waits_for_the_decision_says_so(ranks: list[dict[str, Any]]) -> None:
    said = ranks[1]["decision"]
    assert said.startswith("RankError: rank 1 of 2 waited for another rank to agree on what freezes after step 2")
    assert "ddp_timeout=<seconds>" in said
    assert "Timed out" in said, "what torch says is there, too"


def test_a_loop_that_waits_in_its_backward_pass_has_torchs_error(ranks: list[dict[str, Any]]) -> None:
    """Nothing of Frostline is on the way there: this is all that a loop of one's own says."""
    assert ranks[0]["backward"].startswith("RuntimeError: ")
    assert "Timed out" in ranks[0]["backward"]


def test_a_trainer_ends_and_says_which_rank_waited_and_where(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    ended = start("tests.distributed.lost_ranks", tmp_path / "trainer", ranks=2, seconds=FOR_EVER / 3)
    assert ended.returncode
    assert "rank 0 of 2 waited for another rank in training, after step 2" in ended.stderr
    assert "RuntimeError: " in ended.stderr, "hosts and users go on catching what torch raises"
