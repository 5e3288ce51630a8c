"""A memory budget under a real DistributedDataParallel: two processes, gloo, each with the budget for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.budget_ranks import AS_THEY_ARE, POLICIES
from tests.ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    return launch("tests.adapters.budget_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", POLICIES)
def test_no_rank_exceeds_its_budget(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        roomy, tight = rank[name]["roomy"], rank[name]["tight"]
        assert 0.85 * roomy["plan"]["peak"] <= roomy["peak"] <= 1.05 * roomy["plan"]["peak"]
        assert tight["plan"]["peak"] <= tight["plan"]["budget"]
        assert tight["peak"] <= 1.02 * tight["plan"]["budget"], "the Trainer's own sums and batches are not in the plan"
        assert tight["peak"] >= 0.85 * tight["plan"]["peak"], "counts what is never there"


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_have_the_same_plan(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name]["tight"] for rank in ranks)
    assert first["plan"]["considered"], "nothing was measured: the test shows nothing"
    assert first["plan"]["ranks"] == 2
    assert first["plan"] == second["plan"], "seconds too: one clock decides"
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", [*AS_THEY_ARE, "again"])
def test_what_a_run_takes_as_it_is(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert 0.75 * rank[name]["plan"]["peak"] <= rank[name]["peak"] <= 1.02 * rank[name]["plan"]["peak"]


def test_resume_keeps_the_plan(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        before, after = rank["resumed"]["before"], rank["resumed"]["after"]
        assert before["plan"]["considered"]
        assert after["plan"] == before["plan"], "measured again"
        assert after["peak"] <= 1.02 * after["plan"]["budget"]


def test_micro_batches_are_the_same_training(ranks: list[dict[str, Any]]) -> None:
    """BERT does not scale its loss by the number of items, for which the Trainer adds up the ranks: it still does."""
    for rank in ranks:
        whole, split = rank["split"]
        torch.testing.assert_close(torch.tensor(split), torch.tensor(whole), rtol=1e-4, atol=1e-6)


def test_planning_leaves_no_trace_in_random_numbers(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["random"]["same"] for rank in ranks)


def test_every_rank_raises_what_the_first_one_does(ranks: list[dict[str, Any]]) -> None:
    (kind, least), other = (rank["refused"]["least"] for rank in ranks)
    assert kind == "BudgetError"
    assert "cannot be met: a step takes at least" in least
    assert other == [kind, least]
    assert ranks[0]["refused"]["broken"][0] == "KeyError"
    assert ranks[1]["refused"]["broken"] == ["FrostlineError", "the first rank has failed: KeyError: 'labels'"]
