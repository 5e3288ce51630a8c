"""The check against the published cluster: fitted to two iteration times, and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from frostline.simulator.model import largest_batch, memory_bytes, step_time
from frostline.simulator.published import check, setup

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"


def test_the_fit_meets_the_iteration_times() -> None:
    found = check(setup())
    times = [
        step_time(found.profile, found.cluster, depth=0, batch=6, ranks=ranks).total for ranks in (1, 64)
    ]  # fmt: skip
    assert times == pytest.approx([0.29, 8.9])


def test_the_fit_worked_out_by_hand() -> None:
    found = check(setup())
    unit = 0.29 / (6 * 36)
    sending = 8.9 - 0.29 + 0.5 * 6 * 24 * unit - 126 * 50e-6
    assert found.unit_seconds == pytest.approx(unit)
    assert found.bytes_per_second == pytest.approx(126 / 64 * 437_941_264 / sending)


def test_the_set_up_is_bert_base_and_takes_the_published_memory() -> None:
    given = setup()
    assert sum(part.parameter_bytes for part in given.profile.parts) == 4 * (109_482_240 + 3_076)
    sizes = [memory_bytes(given.profile, depth, 6) / 2**20 for depth in (0, 11)]
    assert sizes == pytest.approx([11_327, 1_945], rel=1e-6)
    # "Batch limited to 6 at length 512": not fitted to, and met.
    assert largest_batch(given.profile, given.cluster, 0) == 6


def test_what_is_predicted_does_not_depend_on_what_was_published() -> None:
    known = check(setup())
    other = check(setup({"published": {"time": 99.0, "cost": 1.0, "one_gpu": 7.0}}))
    assert [claim.predicted for claim in known.claims] == [claim.predicted for claim in other.claims]
    assert [claim.published for claim in known.claims] == [4.38, 5.03, 2.05]
    assert other.claims[0].error == pytest.approx(known.claims[0].predicted / 99.0 - 1.0)


def test_the_fit_alone_follows_the_iteration_times() -> None:
    known, slower = check(setup()), check(setup({"iteration_seconds": {"all": 17.8}}))
    assert slower.bytes_per_second < 0.6 * known.bytes_per_second
    assert slower.unit_seconds == known.unit_seconds


def test_every_other_assumption_changes_the_prediction() -> None:
    given = setup()
    known = [claim.predicted for claim in check(given).claims[:2]]
    for alternative in given.alternatives:
        other = [claim.predicted for claim in check(setup(alternative.change)).claims[:2]]
        assert other != pytest.approx(known, rel=1e-6), alternative.what


def test_the_documentation_quotes_what_is_predicted() -> None:
    text = DOCS.read_text()
    for claim in check(setup()).claims:
        assert f"| {claim.predicted:.2f}x | {claim.published:.2f}x | {claim.error:+.0%} |" in text
    for alternative in setup().alternatives:
        time, cost, _ = check(setup(alternative.change)).claims
        assert f"| {alternative.what} | {time.predicted:.2f}x | {cost.predicted:.2f}x |" in text
