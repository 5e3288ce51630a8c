"""NCCL on one GPU: under DDP decisions, bytes, cache and compression are those of the loop without a wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.nccl_rank import CASES
from tests.ranks import launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch("tests.distributed.nccl_rank", tmp_path_factory.mktemp("nccl"), ranks=1)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_wrapper_changes_nothing_but_what_is_sent(name: str, rank: dict[str, Any]) -> None:
    wrapped, plain = rank[name]["wrapped"], rank[name]["plain"]
    assert wrapped["sent"] == wrapped["active"]
    assert wrapped["trajectory"] == plain["trajectory"]
    assert wrapped["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert wrapped["hits"] == plain["hits"]
    assert not wrapped["limits"]


def test_the_line_moved(rank: dict[str, Any]) -> None:
    assert len(set(rank["walk"]["wrapped"]["sent"])) == 4
    assert rank["cached"]["wrapped"]["hits"] > 0
