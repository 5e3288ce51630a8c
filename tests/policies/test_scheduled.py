"""The policies that look at the clock alone: ``none``, ``static``, ``ramp`` and ``random-blocks``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from frostline.errors import ConfigError
from frostline.policies import Decision
from tests.policies.observations import build, seen

# -- none and static ---------------------------------------------------------------------------------


def test_none() -> None:
    policy = build("none")
    assert policy.cadence() is None
    assert policy.start() == Decision()
    assert policy.decide(seen(None))[0] == Decision()


@pytest.mark.parametrize(
    ("options", "depth"),
    [({"depth": 0}, 0), ({"depth": 11}, 11), ({"fraction": 0.0}, 0), ({"fraction": 0.5}, 6), ({"fraction": 0.7}, 8)],
)
def test_static(options: dict[str, float], depth: int) -> None:
    policy = build("static", 12, **options)
    assert policy.cadence() is None
    assert policy.start() == Decision(depth)
    assert policy.decide(seen(None, blocks=12))[0] == Decision(depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 12}, r"depth=12: that freezes all 12 blocks.*valid depths: 0\.\.11"),
        ({"fraction": 1.0}, "fraction=1.0: that freezes all 12 blocks"),
        ({}, "not both and not neither"),
        ({"depth": 1, "fraction": 0.1}, "not both and not neither"),
        ({"fraction": 1.1}, "fraction=1.1"),
        ({"depth": 1.5}, "depth=1.5"),
    ],
)
def test_static_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("static", 12, **options)


# -- ramp --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "share"),
    # Composer's documented schedule: none until `start`, then (t - start) / (1 - start) of `level`.
    [(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.625, 0.25), (0.75, 0.5), (0.875, 0.75), (1.0, 1.0)],
)
@pytest.mark.parametrize("level", [1.0, 0.5])
def test_ramp_by_hand(progress: float, share: float, level: float) -> None:
    decision, _ = build("ramp", 12, start=0.5, level=level).decide(seen(None, blocks=12, progress=progress))
    assert decision == Decision(min(int(12 * share * level), 11)), "the last block always trains"


def test_ramp_over_ten_epochs() -> None:
    """Defaults, one look an epoch, 12 blocks: worked out by hand."""
    policy, depth, found = build("ramp", 12), 0, []
    for epoch in range(1, 11):
        depth = policy.decide(seen(None, blocks=12, depth=depth, progress=epoch / 10))[0].depth
        found.append(depth)
    assert found == [0, 0, 0, 0, 0, 2, 4, 7, 9, 11]


def test_ramp_does_not_lose_a_block_to_rounding() -> None:
    """0.7 * 10 is 6.999... in binary."""
    assert build("ramp", 10, start=0.0, level=0.7).decide(seen(None, blocks=10, progress=1.0))[0] == Decision(7)


def test_ramp_never_thaws() -> None:
    assert build("ramp", 12).decide(seen(None, blocks=12, depth=5, progress=0.1))[0] == Decision(5)


def test_ramp_cadence() -> None:
    cadence = build("ramp", evaluations_per_epoch=4).cadence()
    assert (cadence.every, cadence.unit) == (20.0, "samples")


# -- random-blocks -----------------------------------------------------------------------------------


def _draws(count: int, blocks: int = 6, **options: object) -> list[frozenset[int]]:
    """The blocks that train, draw by draw."""
    policy = build("random-blocks", blocks, **options)
    decisions = [policy.start(), *(policy.decide(seen(None, blocks=blocks))[0] for _ in range(count - 1))]
    assert all(d.depth == 0 for d in decisions)
    return [frozenset(i for i in range(blocks) if f"body.{i}" not in d.resting) for d in decisions]


def test_every_block_trains_equally_often() -> None:
    """2 of 6 blocks, 3000 draws: each about 1000 times; the standard deviation is 26."""
    draws = _draws(3000, active=2)
    assert {len(d) for d in draws} == {2}
    counts = Counter(block for d in draws for block in d)
    assert all(abs(counts[block] - 1000) < 130 for block in range(6)), counts
    pairs = Counter(draws)
    assert len(pairs) == 15, "every pair of blocks is drawn"
    assert all(abs(n - 200) < 70 for n in pairs.values()), pairs


def test_the_first_draw_holds_from_the_start() -> None:
    policy = build("random-blocks", 6)
    assert len([p for p in policy.start().resting if p.startswith("body")]) == 4
    cadence = policy.cadence()
    assert (cadence.every, cadence.unit) == (20, "steps")


@pytest.mark.parametrize(("stem", "head"), [(True, True), (False, True), (True, False), (False, False)])
def test_stem_and_head(stem: bool, head: bool) -> None:
    resting = build("random-blocks", stem=stem, head=head).start().resting
    assert ("stem" in resting, "head" in resting) == (not stem, not head)


def test_seed_decides() -> None:
    assert _draws(20, seed=1) == _draws(20, seed=1)
    assert _draws(20, seed=1) != _draws(20, seed=2)


def test_all_ranks_draw_the_same() -> None:
    """In processes with other hash seeds and other states of the global generators."""
    script = (
        "import random, sys, json, torch; random.seed(int(sys.argv[1])); torch.manual_seed(int(sys.argv[1]))\n"
        "from tests.policies.test_scheduled import _draws\n"
        "print(json.dumps([sorted(d) for d in _draws(50, seed=3)]))"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)],
            env={**os.environ, "PYTHONHASHSEED": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
        )
        for rank in (1, 2)
    ]
    found = [json.loads(rank.communicate()[0]) for rank in ranks]
    assert found[0] == found[1] == [sorted(d) for d in _draws(50, seed=3)]


def test_random_blocks_goes_on_after_a_restart() -> None:
    whole = _draws(10)
    first, second = build("random-blocks", 6), build("random-blocks", 6)
    first.start()
    for _ in range(3):
        first.decide(seen(None, blocks=6))
    second.start()  # as a fresh engine does before it loads its state
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resting = second.decide(seen(None, blocks=6))[0].resting
    assert frozenset(i for i in range(6) if f"body.{i}" not in resting) == whole[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"active": 7}, "active=7: the model has 6 blocks"), ({"active": 0}, "active=0"), ({"every": 0}, "every=0")],
)
def test_random_blocks_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("random-blocks", 6, **options)
