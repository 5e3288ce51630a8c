"""One engine behind all hosts: the same batches give the same decisions, from the same numbers, at the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.hosts import bert
from tests.adapters.loops import Result, accelerated, hugging_face, in_lightning, plain

POLICIES: list[dict[str, Any]] = [
    {"policy": "gradient-norm", "percentile": 75.0, "evaluations_per_epoch": 4},
    {"policy": "random-blocks", "active": 2, "every": 3},
    {"policy": "ramp", "start": 0.25, "level": 0.75, "evaluations_per_epoch": 3},
]


@pytest.fixture(scope="module", params=POLICIES, ids=lambda p: p["policy"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Result]:
    return request.param, plain(bert(), tmp_path_factory.mktemp("plain"), **request.param)


@pytest.mark.parametrize("host", [accelerated, hugging_face, in_lightning])
def test_hosts_agree(host: Callable[..., Result], expected: tuple[dict[str, Any], Result], tmp_path: Path) -> None:
    options, (decisions, weights) = expected
    assert any(d["depth"] > 0 or d["resting"] for d in decisions), "nothing was decided: the test shows nothing"
    found, trained = host(bert(), tmp_path, **options)
    assert found == decisions
    assert all(torch.equal(value, weights[name]) for name, value in trained.items())
