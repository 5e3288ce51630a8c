"""Finding policies by name, those of other packages too, and what every policy must keep to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import frostline
from frostline.errors import ConfigError
from frostline.policies import (
    Decision,
    Explained,
    Observation,
    Plan,
    Policy,
    PolicyOptions,
    available,
    create,
    register,
    registry,
    validate,
)
from tests.policies.observations import plan, seen

SHIPPED: dict[str, dict[str, Any]] = {
    "interlayer": {},
    "none": {},
    "static": {"depth": 2},
    "ramp": {"evaluations_per_epoch": 5},
    "random-blocks": {"every": 3},
    "gradient-norm": {"percentile": 75},
}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


class _Mine(Policy[PolicyOptions]):
    name: ClassVar[str] = "mine"
    summary: ClassVar[str] = "freezes one block"

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        return Decision(1), Explained("mine")


def test_shipped_policies() -> None:
    assert set(available()) == set(SHIPPED)
    for name, policy in available().items():
        assert policy.name == name
        assert policy.summary


def test_register() -> None:
    assert frostline.register(_Mine) is _Mine
    register(_Mine)  # a module that is imported twice
    assert create("mine", {}, plan()).decide(seen(None))[0] == Decision(1)
    assert "mine" in available()


def test_name_that_is_taken() -> None:
    class Other(_Mine):
        name: ClassVar[str] = "ramp"

    with pytest.raises(ConfigError, match=r"policy name 'ramp' is taken by frostline\.policies\.ramp\.Ramp"):
        register(Other)


@pytest.mark.parametrize(("name", "close"), [("gradient_norm", "gradient-norm"), ("random_blocks", "random-blocks")])
def test_unknown_name_lists_close_matches_first(name: str, close: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(name, {})
    assert f"unknown policy {name!r}: did you mean {close!r}?" in str(caught.value)
    assert "Valid choices: gradient-norm, interlayer, none, ramp, random-blocks, static" in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate("random-blocks", {"active": 0, "evry": 5, "seed": "x"})
    message = str(caught.value)
    assert all(part in message for part in ("active=0", "'evry'", "did you mean 'every'", "seed='x'"))
    assert "\n" not in message


def test_what_an_option_may_have_meant() -> None:
    with pytest.raises(
        ConfigError, match="'memroy': did you mean 'memory'.*Valid choices: active, every, head, memory, seed, stem$"
    ):
        validate("random-blocks", {"memroy": "max"}, ["memory"])
    with pytest.raises(ConfigError, match="'share': .*; 'share' is an option of policy 'interlayer'$"):
        validate("gradient-norm", {"share": 0.5})
    with pytest.raises(ConfigError, match="'seed' is an option of policy 'random-blocks' and 'interlayer'$"):
        validate("static", {"depth": 1, "seed": 3})


@pytest.fixture
def _third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with an entry point, as pip would leave it."""
    (tmp_path / "their_policies.py").write_text(
        "from frostline.policies import Decision, Explained, Policy, PolicyOptions\n"
        "class TheirOptions(PolicyOptions):\n"
        "    blocks: int = 1\n"
        "class Theirs(Policy[TheirOptions]):\n"
        "    name, summary, Options = 'theirs', 'freezes some', TheirOptions\n"
        "    def start(self):\n"
        "        return Decision(self.options.blocks)\n"
        "    def decide(self, seen):\n"
        "        return self.start(), Explained('theirs')\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[frostline.policies]\ntheirs = their_policies:Theirs\nramp = their_policies:Theirs\n"
        "broken = no_such_module:It\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_third_party")
def test_entry_point_of_another_package() -> None:
    from tests.adapters.hosts import bert

    assert "theirs" in available()
    assert "broken" not in available(), "one package that cannot be loaded must not take the others with it"
    assert available()["ramp"].__module__ == "frostline.policies.ramp", "a shipped name cannot be taken over"
    frost = frostline.Frostline(bert(), None, policy="theirs", blocks=None, steps_per_epoch=4, epochs=1)
    assert frost.depth == 1
    with pytest.raises(ConfigError, match=r"did you mean 'theirs'"):
        validate("their", {})
    with pytest.raises(ConfigError, match=r"'block': did you mean 'blocks'"):
        validate("theirs", {"block": 3})


# -- what holds for every policy ---------------------------------------------------------------------


def _observations(name: str, count: int = 10) -> list[Observation]:
    """A recorded run: what the policy's own decisions led it to see."""
    random = np.random.default_rng(0)
    policy, found = create(name, SHIPPED[name], plan(8)), []
    depth = policy.start().depth
    for n in range(1, count + 1):
        scores = random.lognormal(size=8 - depth).tolist() if policy.needs else None
        found.append(seen(scores, depth=depth, blocks=8, progress=n / count, step=2 * n))
        depth = policy.decide(found[-1])[0].depth
    return found


def _replay(policy: Policy[Any], observations: list[Observation]) -> list[tuple[Decision, Explained]]:
    return [policy.decide(observation) for observation in observations]


@pytest.mark.parametrize("name", SHIPPED)
def test_same_numbers_same_decisions(name: str) -> None:
    """Also after the numbers went through a log file."""
    observations = _observations(name)
    first, second = (create(name, SHIPPED[name], plan(8)) for _ in range(2))
    assert first.start() == second.start()
    written = [Observation.from_numbers(json.loads(json.dumps(o.numbers()))) for o in observations]
    assert written == observations
    assert _replay(first, observations) == _replay(second, written)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_state_round_trip(name: str, cut: int) -> None:
    observations = _observations(name)
    whole, first, second = (create(name, SHIPPED[name], plan(8)) for _ in range(3))
    for policy in (whole, first, second):
        policy.start()
    expected = _replay(whole, observations)
    _replay(first, observations[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert _replay(second, observations[cut:]) == expected[cut:]


@pytest.mark.parametrize("name", SHIPPED)
def test_decisions_are_within_bounds(name: str) -> None:
    policy = create(name, SHIPPED[name], plan(8))
    paths = {*plan(8).block_paths, *plan(8).stem_paths, *plan(8).head_paths, *plan(8).layer_paths}
    for decision, why in _replay(policy, _observations(name)):
        assert 0 <= decision.depth < 8
        assert decision.resting <= paths
        assert json.loads(json.dumps(why.numbers()))["reason"] == why.reason


def test_plan_goes_through_a_log_file() -> None:
    assert Plan.from_numbers(json.loads(json.dumps(plan().numbers()))) == plan()
    assert plan(epochs=2.5).total_samples == 200.0
