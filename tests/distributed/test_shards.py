"""A model that ``fully_shard`` (FSDP2) has split: it freezes and thaws in place, and is measured as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.shard_ranks import OPTIONS
from tests.ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw; each holds every step to law 1 by itself."""
    return launch("tests.distributed.shard_ranks", tmp_path_factory.mktemp("ranks"))


def test_bytes_follow_the_frost_line(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        steps = rank["walk"]["steps"]
        assert [step["depth"] for step in steps[::3]] == [0, 1, 2, 3, 1, 0, 2, 3, 0]
        # A part is filled up where a dimension is not a multiple of the ranks.
        assert [step["sent"] for step in steps] == pytest.approx([step["active"] for step in steps], rel=0.02)
        assert len({step["sent"] for step in steps}) == 4


@pytest.mark.parametrize("name", ["walk", "gradient-norm"])
def test_it_is_the_training_of_ddp(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        losses, expected = ([step["loss"] for step in rank[key]["steps"]] for key in (name, f"{name}-ddp"))
        assert losses == pytest.approx(expected, rel=1e-5)


def test_stem_and_head_are_told_apart(ranks: list[dict[str, Any]]) -> None:
    """What a pass computes with are copies; they stand for the parameters."""
    assert ranks[0]["walk"]["traced"]
    assert ranks[0]["walk"]["owners"]["classifier.weight"] == "head"
    assert ranks[0]["walk"]["owners"] == ranks[0]["walk-ddp"]["owners"]


def test_statistic_is_that_of_all_parts(ranks: list[dict[str, Any]]) -> None:
    split, whole = ranks[0]["gradient-norm"]["decisions"], ranks[0]["gradient-norm-ddp"]["decisions"]
    assert len(split) == len(whole) > 2
    assert max(event["depth"] for event in split) > 0, "nothing froze: the test shows nothing"
    for one, other in zip(split, whole, strict=True):
        assert one["depth"] == other["depth"]
        assert one["observation"]["scores"] == pytest.approx(other["observation"]["scores"], rel=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_agree(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["decisions"] == second["decisions"]
    assert first["weights"] == second["weights"]
    assert [step["resting"] for step in first["steps"]] == [step["resting"] for step in second["steps"]]
    if name == "interlayer":
        assert len({tuple(step["resting"]) for step in first["steps"]}) > 2


def test_state_is_whole(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        state = rank["state"]
        assert state["tensors"] > 0
        assert state["whole"]
        assert state["same"]
        assert state["steps"][0] == state["steps"][1] > 0


def test_what_cannot_work_is_said(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert [limit for limit in rank["cached"]["limits"] if "boundary activations are not cached" in limit]
        assert "use memory='off'" in rank["refused"]
