"""SlimFit's inter-layer scheduling: what rests, what comes back, and in which order layers are first visited."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from frostline.errors import ConfigError
from frostline.policies import Decision, Plan, create
from frostline.policies.interlayer import Interlayer, InterlayerOptions
from tests.policies.observations import plan, seen

LAYERS = tuple(f"body.{i}.{name}.weight" for i in range(4) for name in ("linear", "norm")) + ("stem.table.weight",)
BIASES = tuple(f"body.{i}.linear.bias" for i in range(4)) + ("head.bias",)


def layered() -> Plan:
    depths = (*(1 + i for i in range(4) for _ in range(2)), 1, 0)
    return replace(plan(), layer_paths=(*LAYERS, "head.weight"), bias_paths=BIASES, layer_depths=depths)


def build(**options: object) -> Interlayer:
    """Ranked as published, all layers against each other, unless asked otherwise."""
    policy = create("interlayer", {"within": "model", **options}, layered())
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
    distances = {path: place + 1 for place, path in enumerate(LAYERS)}
    policy.load_state_dict({"distances": distances, "rates": {}, "rate": None, "asked": 0, "depth": 0})
    decision = policy.start()
    assert training(decision) == set(LAYERS[-3:])
    # Only what trained is measured; the fourth, resting at 6, is now farther than the last.
    decision = ask(policy, {LAYERS[-1]: 0.5, LAYERS[-2]: 8.0, LAYERS[-3]: 7.0})
    assert training(decision) == {LAYERS[-2], LAYERS[-3], LAYERS[-4]}
    assert policy.distances[LAYERS[-4]] == 6.0


@pytest.mark.parametrize("again", [False, True], ids=["", "resumed"])
def test_layers_that_first_trained_while_the_rate_was_low_are_not_left_behind(again: bool) -> None:
    """A warm-up of ten steps; layers move with the rate, and a little less each time that they train."""
    policy = build(share=0.7)
    trained = dict.fromkeys(LAYERS, 0)
    decision = policy.start()
    for step in range(60):
        rate = 1e-3 * min(1.0, (step + 1) / 10)
        changes = {path: rate * 0.99 ** trained[path] for path in training(decision)}
        for path in changes:
            trained[path] += 1
        decision, _ = policy.decide(replace(seen(None), changes=changes, learning_rate=rate))
        if again:
            state = json.loads(json.dumps(policy.state_dict()))
            policy = build(share=0.7)
            policy.load_state_dict(state)
    assert min(trained.values()) >= 10, trained


def test_a_rate_that_falls_ranks_layers_as_published() -> None:
    policy, published = build(share=0.7), build(share=0.7)
    decision = policy.start()
    published.start()
    for step in range(60):
        rate = 1e-3 * (1 - step / 60)
        changes = {path: rate * (1 + place) for place, path in enumerate(LAYERS) if path in training(decision)}
        observed = replace(seen(None), changes=changes)
        decision, _ = policy.decide(replace(observed, learning_rate=rate))
        assert decision.resting == published.decide(observed)[0].resting


@pytest.mark.parametrize(("share", "rest"), [(0.5, 2), (0.75, 3), (0.9, 3)])
def test_like_is_ranked_with_like(share: float, rest: int) -> None:
    """Matrices move a hundred times as far as the norms beside them: of either kind as many rest."""
    policy = create("interlayer", {"share": share}, layered())
    decision = policy.start()
    trained: set[str] = set()
    for _ in range(8):
        for kind in ("linear", "norm"):
            assert len([path for path in decision.resting if path.endswith(f"{kind}.weight")]) == rest
        assert "stem.table.weight" not in decision.resting, "nothing else is like it"
        trained |= training(decision)
        changes = {path: 100.0 if "linear" in path else 1.0 for path in training(decision)}
        decision, _ = policy.decide(replace(seen(None), changes=changes))
    assert trained == set(LAYERS), "each is visited first"


def test_of_a_kind_those_that_move_least_rest() -> None:
    policy = create("interlayer", {"share": 0.5}, layered())
    distances = {path: float(path[5]) if path.startswith("body") else 0.0 for path in LAYERS}
    policy.load_state_dict({"distances": distances, "rates": {}, "rate": None, "asked": 0, "depth": 0})
    above = {path for path in LAYERS if path.startswith(("body.2.", "body.3."))}
    assert training(policy.start()) == above | {"stem.table.weight"}


@pytest.mark.parametrize(
    ("share", "blocks", "rest"), [(0.34, 2, 1), (0.2, 2, 0), (0.95, 2, 1), (0.34, 12, 4), (0.9, 12, 11), (0.0, 12, 0)]
)
def test_of_few_layers_the_nearest_number_rests_and_never_all(share: float, blocks: int, rest: int) -> None:
    layers = tuple(f"body.{i}.weight" for i in range(blocks))
    few = replace(plan(blocks), layer_paths=layers, layer_depths=tuple(range(1, blocks + 1)))
    assert len(create("interlayer", {"share": share}, few).start().resting) == rest


def test_a_head_that_is_scheduled_takes_turns_as_one_kind() -> None:
    """The head of an encoder-decoder is its whole decoder."""
    body = tuple(f"body.{i}.weight" for i in range(4))
    layers = (*body, *(f"head.{name}.weight" for name in ("dense", "norm", "out", "last")), "stem.weight")
    scheduled = replace(plan(), layer_paths=layers, layer_depths=(1, 2, 3, 4, 0, 0, 0, 0, 1))
    resting = create("interlayer", {"share": 0.5, "head": False}, scheduled).start().resting
    assert sorted(path[:4] for path in resting) == ["body", "body", "head", "head"]
    resting = create("interlayer", {"share": 0.5}, scheduled).start().resting
    assert sorted(path[:4] for path in resting) == ["body", "body"]
    alone = replace(scheduled, layer_paths=(*body, "head.weight"), layer_depths=(1, 2, 3, 4, 0))
    assert len(create("interlayer", {"share": 0.5, "head": False}, alone).start().resting) == 2


def test_blocks_ten_and_one_are_told_apart() -> None:
    """``body.1`` begins ``body.10`` as well."""
    layers = tuple(f"body.{i}.weight" for i in range(12))
    decision = create(
        "interlayer", {"share": 0.75}, replace(plan(12), layer_paths=layers, layer_depths=tuple(range(1, 13)))
    ).start()
    assert len(decision.resting) == 9


def test_in_blocks_that_have_nothing_in_common_all_are_ranked_together() -> None:
    layers = (*(f"body.{i}.part{i}.weight" for i in range(4)), "stem.weight")
    some = replace(plan(), layer_paths=layers, layer_depths=(1, 2, 3, 4, 1))
    for seed in range(8):
        decision = create("interlayer", {"share": 0.5, "seed": seed}, some).start()
        assert len(decision.resting) == 2
        assert "stem.weight" not in decision.resting, "what stands outside of the blocks is not one of them"


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


def test_a_share_that_is_left_open_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"share='auto'.*memory\.budget"):
        build(share="auto")
    options = InterlayerOptions(share="auto")
    assert options.undecided == "share"
    shares = [choice["share"] for choice in options.choices(pages=False)]
    assert shares == sorted(shares)
    paged = options.choices(pages=True)
    assert paged[:2] == [{"share": shares[0]}, {"share": shares[0], "moments": "host"}]
    assert InterlayerOptions(share=0.5, moments="drop").choices(pages=True) == [{}]


def test_the_heaviest_decision_lets_the_largest_layers_train() -> None:
    policy = build(share=0.7)
    sizes = {path: place for place, path in enumerate(LAYERS)}
    assert training(policy.heaviest(sizes)) == set(LAYERS[-3:])
    assert not policy.distances
    lowest = build(share=0.7, biases=False).heaviest(sizes)
    assert LAYERS[0] in training(lowest), "what is above keeps its activations down to there"


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layers"):
        create("interlayer", {}, replace(plan(), layer_paths=()))


def test_below_a_line_nothing_takes_turns() -> None:
    policy = build(share=0.5, line={"policy": "static", "depth": 2})
    decision = policy.start()
    above = {path for path in LAYERS if path.startswith(("body.2.", "body.3."))}
    for _ in range(4):
        assert decision.depth == 2
        assert decision.resting < above
        assert len(decision.resting) == 2
        decision, _ = policy.decide(replace(seen(None, depth=2), changes=dict.fromkeys(above - decision.resting, 1.0)))
    assert set(policy.distances) == above


def test_a_line_moves_when_its_own_policy_is_asked() -> None:
    """Once an epoch (of ten steps), half of the stack at the end of the second."""
    policy = build(share=0.5, line={"policy": "ramp", "start": 0.0, "level": 0.5})
    depth, depths = policy.start().depth, []
    for step in range(1, 21):
        here = replace(seen(None, depth=depth, step=step, progress=step / 20), changes={})
        depth = policy.decide(here)[0].depth
        depths.append(depth)
    assert depths == [0] * 9 + [1] * 10 + [2]


def test_a_line_that_was_not_moved_is_where_it_is() -> None:
    """The engine may refuse a move (max_depth_changes): what is above is seen from there."""
    policy = build(share=0.5, line={"policy": "ramp", "start": 0.0, "level": 0.5})
    assert policy.decide(replace(seen(None, step=10, progress=0.5), changes={}))[0].depth == 1
    decision, _ = policy.decide(replace(seen(None, depth=0, step=11, progress=0.55), changes={}))
    assert decision.depth == 0
    assert len(decision.resting) == len(LAYERS) // 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"policy": "gradient-norm"}, "static"),
        ({"depth": 2}, "static"),
        ({"policy": "static"}, "either depth"),
        ({"policy": "ramp", "strat": 0.5}, "start"),
        ({"policy": "static", "depth": 4}, "0..3"),
    ],
)
def test_a_line_that_cannot_be_is_refused(line: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(line=line)


@pytest.mark.parametrize("line", [None, {"policy": "ramp", "start": 0.0, "level": 0.5}])
def test_state_comes_back_through_json(line: dict[str, object] | None) -> None:
    policy, other = build(share=0.7, line=line), build(share=0.7, line=line)
    decision = policy.start()

    def ask_at(which: Interlayer, step: int, change: float) -> Decision:
        here = seen(None, depth=decision.depth, step=step, progress=step / 20)
        return which.decide(replace(here, changes=dict.fromkeys(training(decision), change)))[0]

    for step in range(1, 13):
        decision = ask_at(policy, step, 1.0 / step)
    assert (decision.depth > 0) == (line is not None)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert ask_at(other, 13, 0.01) == ask_at(policy, 13, 0.01)
    assert other.state_dict() == policy.state_dict()
