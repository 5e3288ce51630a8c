"""SlimFit's inter-layer scheduling: what rests, what comes back, and in which order layers are first visited."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from frostline.errors import ConfigError
from frostline.policies import Decision, Plan, create
from frostline.policies.interlayer import Interlayer
from tests.policies.observations import plan, seen

LAYERS = tuple(f"body.{i}.{name}.weight" for i in range(4) for name in ("linear", "norm")) + ("stem.table.weight",)
BIASES = tuple(f"body.{i}.linear.bias" for i in range(4)) + ("head.bias",)


def layered() -> Plan:
    return replace(plan(), layer_paths=(*LAYERS, "head.weight"), bias_paths=BIASES)


def build(**options: object) -> Interlayer:
    policy = create("interlayer", options, layered())
    assert isinstance(policy, Interlayer)
    return policy


def training(decision: Decision) -> set[str]:
    return set(LAYERS) - decision.resting


def ask(policy: Interlayer, changes: dict[str, float] | None) -> Decision:
    decision, _ = policy.decide(replace(seen(None), changes=changes))
    return decision


def test_every_layer_is_visited_once_before_any_is_visited_again() -> None:
    policy = build(share=0.7)  # of nine layers six rest
    visited: list[str] = []
    decision = policy.start()
    for step in range(3):
        assert decision.depth == 0
        assert len(decision.resting) == 6
        visited.extend(sorted(training(decision)))
        # Distances fall, so that by distance alone the first would be chosen again.
        decision = ask(policy, dict.fromkeys(training(decision), 10.0 - step))
    assert sorted(visited) == sorted(LAYERS)


def test_the_order_of_the_first_visits_is_seeded() -> None:
    first, same, other = (training(build(share=0.7, seed=seed).start()) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_layers_that_move_least_rest_and_come_back_when_the_others_fall_below_them() -> None:
    policy = build(share=0.7)
    policy.load_state_dict({"distances": {path: place + 1 for place, path in enumerate(LAYERS)}})
    decision = policy.start()
    assert training(decision) == set(LAYERS[-3:])
    # Only what trained is measured; the fourth, resting at 6, is now farther than the last.
    decision = ask(policy, {LAYERS[-1]: 0.5, LAYERS[-2]: 8.0, LAYERS[-3]: 7.0})
    assert training(decision) == {LAYERS[-2], LAYERS[-3], LAYERS[-4]}
    assert policy.distances[LAYERS[-4]] == 6.0


def test_a_step_that_was_skipped_changes_nothing() -> None:
    policy = build()
    before = policy.start()
    assert ask(policy, None) == before
    assert not policy.distances


def test_a_layer_that_had_no_gradient_counts_as_visited() -> None:
    policy = build(share=0.7)
    decision = ask(policy, dict.fromkeys(training(policy.start()), 2.0))
    unused = sorted(training(decision))[0]
    decision = ask(policy, dict.fromkeys(training(decision) - {unused}, 1.0))
    assert policy.distances[unused] == 0.0
    assert unused not in training(decision)


def test_the_head_and_biases_train_unless_switched_off() -> None:
    assert build().layers == list(LAYERS)
    assert "head.weight" in build(head=False).layers
    decision = build(share=0.7, biases=False).start()
    resting = {path for path in decision.resting if path.endswith("bias")}
    assert resting == {p for p in BIASES if f"{p.rpartition('.')[0]}.weight" in decision.resting}
    assert resting


def test_one_layer_always_trains() -> None:
    assert len(training(build(share=0.99).start())) == 1
    assert build(share=0.0).start().resting == frozenset()


@pytest.mark.parametrize("share", [1.0, -0.1, 2.0, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        build(share=share)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layers"):
        create("interlayer", {}, replace(plan(), layer_paths=()))


def test_state_comes_back_through_json() -> None:
    policy, other = build(share=0.7), build(share=0.7)
    decision = policy.start()
    for step in range(5):
        decision = ask(policy, dict.fromkeys(training(decision), 1.0 / (step + 1)))
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    changes = dict.fromkeys(training(decision), 0.01)
    assert ask(other, changes) == ask(policy, changes)
