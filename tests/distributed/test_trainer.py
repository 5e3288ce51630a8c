"""The same inside an unmodified Hugging Face Trainer, which holds its wrapper in variables of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.trainer_ranks import CASES
from tests.ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw; each checks by itself that the wrapper stays the same object."""
    return launch("tests.distributed.trainer_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_bytes_follow_the_frost_line(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        steps = rank[name]["steps"]
        assert len(steps) == 16
        assert [step["sent"] for step in steps] == [step["active"] for step in steps]
        # The ramp moves after steps 6 and 12, and once more with the last one.
        assert len({step["sent"] for step in steps}) == (1 if name == "initial" else 3)
        assert not rank[name]["limits"]
    assert ranks[0][name]["weights"] == ranks[1][name]["weights"]


@pytest.mark.parametrize("name", ["explicit", "checkpointing"])
def test_it_is_the_same_training(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][name]["losses"] == pytest.approx(ranks[0]["default"]["losses"], rel=1e-6)


def test_frozen_from_the_start(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["initial"]["steps"][0]["sent"] < ranks[0]["explicit"]["steps"][0]["sent"]


def test_resume(ranks: list[dict[str, Any]]) -> None:
    """The wrapper is built of a model that is not frozen yet; the frozen set comes with the state."""
    for rank in ranks:
        whole, resumed = rank["saved"], rank["resumed"]
        assert resumed["steps"] == whole["steps"][8:]
        assert resumed["steps"][0]["sent"] < whole["steps"][0]["sent"], "nothing was frozen: the test shows nothing"
        assert resumed["weights"] == whole["weights"]


def test_records_are_read(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["cached"]["read"] > 0
    assert ranks[0]["cached"]["losses"] == pytest.approx(ranks[0]["explicit"]["losses"], rel=1e-4)
