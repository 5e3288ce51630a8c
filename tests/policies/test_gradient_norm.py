"""``gradient-norm``: Algorithm 1 of AutoFreeze on numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from frostline.errors import ConfigError
from frostline.policies import Decision
from tests.policies.observations import build, seen, walk

# Against a reference of ones, a score of 1 + x is a change of x.
ONES = [1.0, 1.0, 1.0, 1.0]


def _after_reference(scores: list[float], depth: int = 0, **options: Any) -> tuple[Decision, Any]:
    blocks = depth + len(scores)
    policy = build("gradient-norm", blocks, **options)
    policy.decide(seen([1.0] * len(scores), depth=depth, blocks=blocks))
    return policy.decide(seen(scores, depth=depth, blocks=blocks))


def test_first_evaluation_is_the_reference() -> None:
    decision, why = build("gradient-norm").decide(seen([5.0, 1.0, 1.0, 1.0]))
    assert decision == Decision(0)
    assert (why.changes, why.threshold) == ({}, None)
    assert "reference" in why.reason


@pytest.mark.parametrize(
    ("scores", "percentile", "threshold", "depth"),
    [
        # Changes 0.1 0.2 0.3 0.4: the median lies half way between the two in the middle.
        ([1.1, 1.2, 1.3, 1.4], 50, 0.25, 2),
        # Rank 0.25 * 3 = 0.75: 0.1 + 0.75 * (0.2 - 0.1). Only the first change is below.
        ([1.1, 1.2, 1.3, 1.4], 25, 0.175, 1),
        # Rank 2.25: 0.3 + 0.25 * 0.1.
        ([1.1, 1.2, 1.3, 1.4], 75, 0.325, 3),
        # The maximum itself is not below it.
        ([1.1, 1.2, 1.3, 1.4], 100, 0.4, 3),
        # The minimum: nothing is below it.
        ([1.1, 1.2, 1.3, 1.4], 0, 0.1, 0),
        # A norm that falls has changed as much as one that rises.
        ([0.9, 1.2, 0.7, 1.4], 50, 0.25, 2),
        # The walk stops at the first block that fails, though the third is below the threshold.
        ([1.1, 1.4, 1.2, 1.3], 50, 0.25, 1),
        ([1.4, 1.1, 1.2, 1.3], 50, 0.25, 0),
    ],
)
def test_by_hand(scores: list[float], percentile: float, threshold: float, depth: int) -> None:
    decision, why = _after_reference(scores, percentile=percentile)
    assert why.threshold == pytest.approx(threshold)
    assert why.changes == pytest.approx({i: abs(s - 1) for i, s in enumerate(scores)})
    assert decision == Decision(depth)


def test_at_the_threshold_stays_active() -> None:
    """Five equal steps of one half: the median block's change equals the threshold to the last bit."""
    decision, why = _after_reference([1.5, 2.0, 2.5, 3.0, 3.5])
    assert why.threshold == why.changes[2] == 1.5
    assert decision == Decision(2), "below is strict: at the threshold a block stays active"


def test_all_equal_freezes_nothing() -> None:
    decision, why = _after_reference([1.5, 1.5, 1.5, 1.5])
    assert why.threshold == 0.5
    assert decision == Decision(0)


def test_zero_threshold_keeps_what_is_frozen() -> None:
    """No gradient has changed at all. The released code would thaw everything here."""
    decision, why = _after_reference([1.0, 1.0, 1.0], depth=2)
    assert why.threshold == 0.0
    assert decision == Decision(2)


def test_zero_reference_stays_active() -> None:
    """A block whose gradient was exactly zero has no relative change: it is left out of the percentile."""
    policy = build("gradient-norm")
    policy.decide(seen([1.0, 0.0, 1.0, 1.0]))
    decision, why = policy.decide(seen([1.1, 5.0, 1.3, 1.4]))
    assert math.isinf(why.changes[1])
    assert why.threshold == pytest.approx(0.3)
    assert decision == Decision(1), "the walk stops at the block without a reference"


def test_zero_reference_everywhere() -> None:
    policy = build("gradient-norm")
    policy.decide(seen([0.0, 0.0, 0.0, 0.0]))
    decision, why = policy.decide(seen(ONES))
    assert decision == Decision(0)
    assert "zero for every active block" in why.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_gradients_decide_nothing_and_are_no_reference(bad: float) -> None:
    policy = build("gradient-norm")
    policy.decide(seen(ONES))
    decision, why = policy.decide(seen([1.1, bad, 1.3, 1.4]))
    assert decision == Decision(0)
    assert "[1] are not finite" in why.reason
    decision, why = policy.decide(seen([1.1, 1.2, 1.3, 1.4]))
    assert why.threshold == pytest.approx(0.25), "the sound interval before is still the reference"
    assert decision == Decision(2)


def test_one_active_block_always_trains() -> None:
    decision, why = _after_reference([0.5], depth=3, percentile=100.0)
    assert decision == Decision(3)
    assert "one active block" in why.reason


def test_two_active_blocks() -> None:
    assert _after_reference([1.1, 1.4], depth=2)[0] == Decision(3)
    assert _after_reference([1.4, 1.1], depth=2)[0] == Decision(2)


def test_intervals_of_another_length_are_compared_per_step() -> None:
    policy = build("gradient-norm")
    policy.decide(seen([2.0, 2.0, 2.0, 2.0], interval=2))
    _, why = policy.decide(seen([3.3, 3.6, 3.9, 4.2], interval=3))
    assert why.changes == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4})


def test_reference_moves_on() -> None:
    """Each interval is compared with the one before it, not with the first."""
    found = walk(build("gradient-norm"), [ONES, [2.0, 1.1, 1.1, 1.1], [2.2, 2.2, 2.2, 2.2]])
    assert [d.depth for d, _ in found] == [0, 0, 1]
    assert found[2][1].changes == pytest.approx({0: 0.1, 1: 1.0, 2: 1.0, 3: 1.0})


def _slow_first(evaluations: int, blocks: int) -> list[list[float]]:
    """Scores whose changes grow with the block: the fastest freezing there is."""
    return [[(1 + 0.01 * (block + 1)) ** n for block in range(blocks)] for n in range(evaluations)]


def test_fastest_path_from_twelve_blocks() -> None:
    """At the median at most half of the active blocks freeze at once: 6, 9, 10, 11 and no further."""
    found = walk(build("gradient-norm", 12), _slow_first(8, 12), blocks=12)
    assert [d.depth for d, _ in found] == [0, 6, 9, 10, 11, 11, 11, 11]


@pytest.mark.parametrize("seed", range(20))
def test_at_most_half_of_the_active_blocks_freeze_at_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = int(random.integers(2, 25))
    found = walk(build("gradient-norm", blocks), random.lognormal(size=(12, blocks)).tolist(), blocks=blocks)
    depths = [d.depth for d, _ in found]
    assert depths[0] == 0
    for before, after in zip(depths, depths[1:], strict=False):
        assert 0 <= after - before <= (blocks - before) // 2
        assert after < blocks


def _algorithm_1(before: list[float], now: list[float], percentile: float) -> int:
    """The published algorithm, written again from the paper: how many of the active blocks freeze."""
    change = np.abs(np.array(before) - np.array(now)) / np.array(before)
    ordered = np.sort(change)
    rank = percentile / 100 * (len(ordered) - 1)
    low = int(rank)
    threshold = ordered[low] + (rank - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    frozen = 0
    while frozen < len(change) - 1 and change[frozen] < threshold:
        frozen += 1
    return frozen


@pytest.mark.parametrize("percentile", [0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 100.0])
def test_against_the_paper(percentile: float) -> None:
    random = np.random.default_rng(int(percentile))
    for _ in range(50):
        scores = random.lognormal(sigma=0.3, size=(6, 9)).tolist()
        depth, expected = 0, [0]
        for before, now in zip(scores, scores[1:], strict=False):
            if len(now) - depth > 1:
                depth += _algorithm_1(before[depth:], now[depth:], percentile)
            expected.append(depth)
        found = walk(build("gradient-norm", 9, percentile=percentile), scores, blocks=9)
        assert [d.depth for d, _ in found] == expected


def test_cadence_is_counted_in_samples() -> None:
    cadence = build("gradient-norm").cadence()
    assert (cadence.every, cadence.unit) == (16.0, "samples")
    assert build("gradient-norm", evaluations_per_epoch=3).cadence().every == pytest.approx(80 / 3)


def test_state_round_trip() -> None:
    scores = _slow_first(6, 12)
    whole = walk(build("gradient-norm", 12), scores, blocks=12)
    first = build("gradient-norm", 12)
    walk(first, scores[:3], blocks=12)
    second = build("gradient-norm", 12)
    second.load_state_dict(first.state_dict())
    depth = whole[2][0].depth
    for (decision, why), row in zip(whole[3:], scores[3:], strict=True):
        assert second.decide(seen(row[depth:], depth=depth, blocks=12)) == (decision, why)
        depth = decision.depth


def test_nothing_freezes_before_start() -> None:
    policy = build("gradient-norm", start=0.3)
    policy.decide(seen(ONES, progress=0.1))
    held, why = policy.decide(seen([1.1, 1.2, 1.3, 1.4], progress=0.25))
    assert held == Decision(0)
    assert "before 0.3" in why.reason
    assert why.changes[0] == pytest.approx(0.1), "what was measured is logged all the same"
    # The reference has moved on meanwhile: changes are 0.1 0.2 0.3 0.4 again.
    then, _ = policy.decide(seen([1.21, 1.44, 1.69, 1.96], progress=0.3))
    assert then == Decision(2)


def test_initial_depth_holds_from_the_first_step() -> None:
    policy = build("gradient-norm", 6, initial_depth=2)
    assert policy.start() == Decision(2)
    assert build("gradient-norm").start() == Decision(0)
    assert policy.decide(seen(ONES, depth=2, blocks=6))[0] == Decision(2)
    assert policy.decide(seen([1.1, 1.2, 1.3, 1.4], depth=2, blocks=6))[0] == Decision(4)


def test_initial_depth_leaves_a_block_active() -> None:
    with pytest.raises(ConfigError, match=r"initial_depth=4: that freezes all 4 blocks.*valid depths: 0..3"):
        build("gradient-norm", 4, initial_depth=4)
