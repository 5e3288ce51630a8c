"""``benchmarks/resting.py``: what it counts is what rests."""

from __future__ import annotations

import pytest
from benchmarks.memory_tables import resting as table
from benchmarks.reports import made_by
from benchmarks.resting import train

from tests.architectures import ARCHITECTURES

_BERT = next(a for a in ARCHITECTURES if a.name == "bert")


@pytest.mark.parametrize(("share", "skipped"), [(0.0, 0.0), (0.5, 0.5)])
def test_of_each_kind_the_share_rests_and_its_work_is_skipped(share: float, skipped: float) -> None:
    batches = [_BERT.inputs(seed=step) for step in range(21)]
    found = train(_BERT.build(), batches, 1e-3, share=share, within="kind")
    # The tiny model's pooler, outside of the blocks, always trains.
    assert found["skipped"] == pytest.approx(skipped, abs=0.1)
    assert found["trained"]["tables"]["of_steps"] == 1.0
    assert found["trained"]["matrices"]["of_steps"] == pytest.approx(1.0 - skipped, abs=0.05)
    said = "\n".join(table(report(found)))
    assert f"| tiny | {share:g} | kind | {100 * found['trained']['matrices']['of_steps']:.0f} % | 100 %" in said


def report(found: dict[str, object]) -> dict[str, object]:
    ways = [{"share": 0.5 if found["skipped"] else 0.0, "within": "kind", **found}]
    return {"steps": 21, "rows": 2, **made_by("resting.py", 0, "cpu"), "models": {"tiny": ways}}
