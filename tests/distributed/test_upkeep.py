"""DDP sends what trains and nothing else, at every depth, and computes what it computed before, or one rank would."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.plain_ranks import CASES, EPOCHS, OF_FOUR, STEPS
from tests.ranks import launch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return launch("tests.distributed.plain_ranks", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks saw."""
    return launch("tests.distributed.plain_ranks", tmp_path_factory.mktemp("four"), ranks=4)


def _losses(run: dict[str, Any]) -> list[float]:
    return [loss for step in run["steps"] for loss in step["losses"]]


def _sent_what_trains(run: dict[str, Any]) -> None:
    assert [step["sent"] for step in run["steps"]] == [step["active"] for step in run["steps"]]
    # The walk ends in three steps of a thawed model.
    assert len({step["sent"] for step in run["steps"]}) == len({step["depth"] for step in run["steps"]}) > 1
    assert run["steps"][-1]["sent"] == run["steps"][0]["sent"]


@pytest.mark.parametrize("name", ["walk", "walk-unused", "accumulated", "small-buckets", "views"])
def test_bytes_follow_the_frost_line(name: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        run = rank[name]
        assert [step["depth"] for step in run["steps"][::3]] == [0, 1, 2, 3, 1, 0, 2, 3, 0]
        assert len(run["steps"]) == EPOCHS * STEPS + 3
        _sent_what_trains(run)
        assert not run["limits"]


def test_bytes_of_a_loop_that_freezes_in_place(two: list[dict[str, Any]]) -> None:
    """The counter sees the difference: without upkeep everything is sent."""
    run = two[0]["walk-in-place"]
    assert len({step["active"] for step in run["steps"]}) == 4
    assert len({step["sent"] for step in run["steps"]}) == 1


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("walk", "walk-in-place"), ("walk-unused", "walk-in-place"), ("views", "walk-in-place"),
        ("small-buckets", "walk-in-place"), ("accumulated", "accumulated-in-place"),
        ("compressed", "compressed-in-place"),
    ],
)  # fmt: skip
def test_it_is_the_same_training(name: str, reference: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert _losses(rank[name]) == pytest.approx(_losses(rank[reference]), rel=1e-6)
    assert _losses(two[0][name]) != _losses(two[1][name]), "both ranks saw the same samples: the test shows nothing"


def test_a_hook_of_the_users_stays(two: list[dict[str, Any]]) -> None:
    """Rounded to half precision on the way, the gradients of each step are others than without the hook."""
    assert two[0]["compressed"]["weights"] == two[0]["compressed-in-place"]["weights"]
    assert two[0]["compressed"]["weights"] != two[0]["walk"]["weights"]
    assert _losses(two[0]["compressed"]) == pytest.approx(_losses(two[0]["walk"]), rel=0.05)


def test_power_sgd_begins_anew(two: list[dict[str, Any]]) -> None:
    """What it keeps for each bucket fits no other buckets: the next step would end in an error."""
    run = two[0]["power"]
    assert run["compressed"] > 0, "nothing was compressed: the test shows nothing"
    assert len(run["steps"]) == EPOCHS * STEPS + 3


def test_records_are_read(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["cached"]["cache"]["hits"] > 0
        assert rank["cached"]["cache"]["upgrades"] > 0
        assert not rank["cached"]["limits"]
        assert _losses(rank["cached"]) == pytest.approx(_losses(rank["stay"]), rel=1e-5)
        _sent_what_trains(rank["cached"])


@pytest.mark.parametrize("name", ["random", "random-unused"])
def test_layers_that_rest_for_some_steps_are_not_sent(name: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        steps = rank[name]["steps"]
        assert [step["sent"] for step in steps] == [step["active"] for step in steps]
        assert steps[0]["sent"] < 0.5 * steps[-1]["sent"]


def test_layers_that_rest_for_a_step_stay_in_the_wrapper(two: list[dict[str, Any]]) -> None:
    """Each trains again soon, and its gradient must be exchanged then."""
    steps = two[0]["restless"]["steps"]
    assert len({step["active"] for step in steps}) > 2
    assert {step["sent"] for step in steps} == {steps[-1]["active"]}


@pytest.mark.parametrize("name", [name for name in CASES if "in-place" not in name])
def test_two_ranks_agree(name: str, two: list[dict[str, Any]]) -> None:
    runs = [rank[name] for rank in two]
    _agree(runs)
    assert runs[0]["decisions"] or name == "restless", "nothing was decided: the test shows nothing"


def _agree(runs: list[dict[str, Any]]) -> None:
    for run in runs[1:]:
        assert run["decisions"] == runs[0]["decisions"], "decisions, or the numbers behind them, differ between ranks"
        assert run["weights"] == runs[0]["weights"]
        assert [step["depth"] for step in run["steps"]] == [step["depth"] for step in runs[0]["steps"]]


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_that_measure_otherwise_decide_the_same(ranks: str, request: pytest.FixtureRequest) -> None:
    """All but the first are told wrong numbers, of which the test of gradient norms would make other decisions."""
    runs = [rank["split"] for rank in request.getfixturevalue(ranks)]
    _agree(runs)
    assert max(step["depth"] for step in runs[0]["steps"]) > 0, "nothing froze: the test shows nothing"
    for run in runs:
        assert [step["sent"] for step in run["steps"]] == [step["active"] for step in run["steps"]]


@pytest.mark.parametrize("name", ["walk", "random"])
def test_four_ranks(name: str, four: list[dict[str, Any]]) -> None:
    assert len(four) == 4
    assert name in OF_FOUR
    _agree([rank[name] for rank in four])
    for rank in four:
        assert [step["sent"] for step in rank[name]["steps"]] == [step["active"] for step in rank[name]["steps"]]
        # Sums of four depend on their order, which depends on the place in a bucket.
        assert _losses(rank["walk"]) == pytest.approx(_losses(rank["walk-in-place"]), rel=1e-5)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_that_share_a_batch_train_as_one_that_has_it_whole(ranks: str, request: pytest.FixtureRequest) -> None:
    """Same moves of the line; the losses within 1e-5 where every step begins with the same weights (teacher-forced)."""
    runs = [rank["shared"] for rank in request.getfixturevalue(ranks)]
    shares = [run["together"]["losses"] for run in runs]
    assert shares[0] != shares[1], "the ranks saw the same samples: the test shows nothing"
    means = [sum(losses) / len(runs) for losses in zip(*shares, strict=True)]
    for name, within in (("taught", 1e-5), ("alone", 1e-4)):
        together, one = runs[0]["together"], runs[0][name]
        assert means == pytest.approx(one["losses"], rel=within)
        assert together["depths"] == one["depths"]
        assert len(together["scores"]) == len(one["scores"])
        for scores, expected in zip(together["scores"], one["scores"], strict=True):
            assert scores == pytest.approx(expected, rel=1e-4)
    assert len(set(runs[0]["together"]["depths"])) > 2, "the line hardly moved: the test shows nothing"


def test_frozen_set_that_changes_within_a_forward_pass(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["late"]["owners"] == ["stem", "head"], "the first look was right: the test shows nothing"
        assert [step["sent"] for step in rank["late"]["steps"]] == [step["active"] for step in rank["late"]["steps"]]
    assert two[0]["late"]["weights"] == two[1]["late"]["weights"]


def test_training_after_an_interrupted_backward_pass(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["interrupted"]
        frozen, whole = found["sent"][:3], found["sent"][3:]
        assert len(set(frozen)) == 1
        assert frozen[0] < found["all"]
        assert whole == [found["all"]] * 3
    assert two[0]["interrupted"]["weights"] == two[1]["interrupted"]["weights"]


def test_what_cannot_work_is_refused(two: list[dict[str, Any]]) -> None:
    for rank in two:
        static, *restless = rank["refused"]
        assert "build it without static_graph" in static
        assert len(restless) == 2
        assert all("build it with find_unused_parameters=True" in message for message in restless)
