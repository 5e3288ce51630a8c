"""Jobs that take turns: each works for as long as it says, and does not count the time for which it stood still."""

from __future__ import annotations

import time
from typing import Any

import pytest
from benchmarks.turns import Job, in_turns


def work(seconds: float) -> dict[str, float]:
    """Work for ``seconds`` of processor time; what its clocks say of it, and what the world's says."""
    began, real, used = time.perf_counter(), time.monotonic(), time.process_time()
    while time.process_time() - used < seconds:
        pass
    return {"own": time.perf_counter() - began, "real": time.monotonic() - real, "used": time.process_time() - used}


def fail(*_: Any) -> None:
    raise ValueError("no")


def test_a_job_counts_its_own_turns_only() -> None:
    found = in_turns({"one": Job(work, (1.0,), 0.2), "other": Job(work, (1.0,), 0.1)})
    one, other = found["one"], found["other"]
    for job in (one, other):
        assert job["used"] == pytest.approx(1.0, abs=0.1)
        assert job["own"] >= job["used"] - 0.05
    # The one stands still for about half as long as it works, by clocks that count everything.
    assert one["real"] - one["own"] > 0.3
    assert other["real"] - other["own"] > 0.3


def test_a_job_that_fails_ends_the_others() -> None:
    with pytest.raises(RuntimeError, match="bad failed"):
        in_turns({"good": Job(work, (60.0,), 0.1), "bad": Job(fail, (), 0.1)})
