"""One engine behind all hosts: the same batches give the same decisions, from the same numbers, at the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.hosts import bert
from tests.adapters.loops import Result, accelerated, hugging_face, in_lightning, plain
from tests.memory.steps import everything_packs

POLICIES: list[dict[str, Any]] = [
    {"policy": "gradient-norm", "percentile": 75.0, "evaluations_per_epoch": 4},
    {"policy": "random-blocks", "active": 2, "every": 3},
    {"policy": "ramp", "start": 0.25, "level": 0.75, "evaluations_per_epoch": 3},
    {"policy": "ramp", "start": 0.25, "level": 0.75, "evaluations_per_epoch": 3, "memory": "slimfit"},
]


@pytest.fixture(autouse=True, scope="module")
def _everything_packs() -> Iterator[None]:
    with everything_packs():
        yield


@pytest.fixture(scope="module", params=POLICIES, ids=lambda p: f"{p['policy']}-{p.get('memory', 'off')}")
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Result]:
    return request.param, plain(bert(), tmp_path_factory.mktemp("plain"), **request.param)


@pytest.mark.parametrize("host", [accelerated, hugging_face, in_lightning])
def test_hosts_agree(host: Callable[..., Result], expected: tuple[dict[str, Any], Result], tmp_path: Path) -> None:
    options, (decisions, weights) = expected
    assert any(d["depth"] > 0 or d["resting"] for d in decisions), "nothing was decided: the test shows nothing"
    found, trained = host(bert(), tmp_path, **options)
    assert found == decisions
    assert all(torch.equal(value, weights[name]) for name, value in trained.items())


@pytest.mark.parametrize("host", [plain, accelerated, hugging_face, in_lightning])
def test_compression_reaches_every_host(host: Callable[..., Result], tmp_path: Path) -> None:
    """Packed gradients are near the exact ones, and not the same."""
    options = POLICIES[2]
    (tmp_path / "exact").mkdir()
    (tmp_path / "packed").mkdir()
    _, exact = host(bert(), tmp_path / "exact", **options)
    _, packed = host(bert(), tmp_path / "packed", **options, memory="slimfit")
    assert not all(torch.equal(packed[name], value) for name, value in exact.items())
    assert all(torch.allclose(packed[name], value, atol=0.01) for name, value in exact.items())
