"""Law 1: frozen means frozen, under any optimizer and any loop; thawing and resting work."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from frostline.errors import ConfigError
from frostline.policies.base import Decision
from tests.architectures import ARCHITECTURES, Architecture
from tests.laws.loops import LOOPS, OPTIMIZERS, Loop, Run, crossing, hidden_at, moved, parameters, prefix_buffers

BY_NAME = {a.name: a for a in ARCHITECTURES}
BERT, RESNET = BY_NAME["bert"], BY_NAME["resnet"]
DEPTH = 2

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)

# Every architecture under the three kinds of state; two architectures under every optimizer.
_PAIRS = [(a, o) for a in ARCHITECTURES for o in ("sgd", "adamw", "adafactor")]
_PAIRS += [(a, o) for a in (BERT, RESNET) for o in OPTIMIZERS if o not in ("sgd", "adamw", "adafactor")]


def same_state(actual: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two states of one parameter hold the same bits (numbers and absent values included)."""
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[k], v) if isinstance(v, torch.Tensor) else actual[k] == v for k, v in expected.items()
    )


def check_frozen(run: Run, depth: int = DEPTH) -> None:
    """Train two steps free, freeze to ``depth``, train three more, and hold the prefix to the law."""
    run.train(2)
    active = run.trainable() - set(run.stack.prefix_parameters(depth))
    moments = {n: copy.deepcopy(run.state(n)) for n in active}
    run.freeze(depth)
    prefix = run.stack.prefix_parameters(depth)
    for name in active:
        assert same_state(run.state(name), moments[name]), f"freezing others touched the moments of {name}"
    before, buffers = parameters(run.model), prefix_buffers(run.stack, depth)
    boundary = hidden_at(run, depth)

    run.train(3)

    changed = moved(before, parameters(run.model))
    assert not changed & set(prefix), "a frozen parameter moved"
    assert not moved(buffers, prefix_buffers(run.stack, depth)), "a buffer of the prefix moved"
    assert torch.equal(boundary, hidden_at(run, depth)), "the boundary activation of one batch changed"
    for name, parameter in prefix.items():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert not run.state(name), f"optimizer state of {name} was kept"
    for path in run.stack.block_paths[:depth]:
        assert not any(m.training for m in run.model.get_submodule(path).modules()), f"{path} is in train mode"
    for path in run.stack.block_paths[depth:]:
        assert run.model.get_submodule(path).training, f"{path} is in eval mode"

    assert run.trainable() == active
    for owner in (*range(depth, len(run.stack)), "head"):
        mine = set(run.stack.parameters_of(owner)) & active
        assert mine & changed, f"{owner} did not train"
    for name in changed:
        assert run.state(name), f"optimizer state of {name} was lost"
        steps = run.state(name).get("step")
        if steps is not None and not run.architecture.outside:
            assert int(steps) == 5, f"{name} did not go on with its moments"


@pytest.mark.parametrize(("architecture", "optimizer"), _PAIRS, ids=[f"{a.name}-{o}" for a, o in _PAIRS])
def test_prefix_does_not_move_under_any_optimizer(architecture: Architecture, optimizer: str) -> None:
    check_frozen(Run(architecture, optimizer))


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
@pytest.mark.parametrize("name", ["bert", "llama-classes", "t5", "wav2vec2", "resnet", "plain", "lora-bert"])
def test_prefix_does_not_move_in_any_loop(name: str, loop: Loop) -> None:
    check_frozen(Run(BY_NAME[name], "adamw", loop))


@every_architecture
def test_prefix_is_deterministic_and_builds_no_graph(architecture: Architecture) -> None:
    run = Run(architecture)
    for depth in range(1, architecture.blocks):
        run.freeze(depth)
        assert torch.equal(hidden_at(run, depth), hidden_at(run, depth)), f"the prefix is random at depth {depth}"
        with crossing(run.stack.blocks[depth]) as seen:
            loss = run.model(**architecture.inputs()).loss
        assert all(t.grad_fn is None for t in seen[0]), f"a graph reaches into the prefix at depth {depth}"
        assert loss.requires_grad


@every_architecture
def test_gradients_above_the_line_are_those_of_the_whole_model(architecture: Architecture) -> None:
    """Freezing takes work away, nothing else: loss and active gradients in eval mode are bit-equal."""
    free, frozen = Run(architecture), Run(architecture)
    frozen.freeze(DEPTH)
    losses = []
    # Once nothing trains an attention bias torch takes its fused kernel, which rounds differently on some machines.
    with sdpa_kernel(SDPBackend.MATH) if architecture is BY_NAME["t5"] else nullcontext():
        for run in (free, frozen):
            run.model.eval()
            loss = run.model(**architecture.inputs()).loss
            loss.backward()
            losses.append(loss.detach())
    assert torch.equal(*losses)
    expected = dict(free.model.named_parameters())
    for name, parameter in frozen.model.named_parameters():
        if parameter.requires_grad and expected[name].grad is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-7, msg=name)


@every_architecture
def test_active_part_draws_the_dropout_of_a_hand_frozen_model(architecture: Architecture) -> None:
    """In train mode the step equals that of a model frozen by hand: active blocks keep dropout and their mode."""
    if architecture.outside:
        pytest.skip("freezing this one by hand would leave the randomness beside its blocks on")
    ours, by_hand = Run(architecture), Run(architecture)
    ours.freeze(DEPTH)
    ours.model.train()
    for parameter in by_hand.stack.prefix_parameters(DEPTH).values():
        parameter.requires_grad_(False)
    for module in by_hand.stack.prefix_modules(DEPTH):
        module.eval()
    losses = []
    for run in (ours, by_hand):
        torch.manual_seed(1)
        losses.append(run.model(**architecture.inputs()).loss)
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    expected = dict(by_hand.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name].grad), name


@every_architecture
def test_thaw_trains_again_with_fresh_moments(architecture: Architecture) -> None:
    run = Run(architecture, "adamw")
    born_trainable = run.trainable()
    run.train(2)
    run.freeze(DEPTH)
    run.train(1)
    run.freeze(0)
    assert run.trainable() == born_trainable, "thawing must not train what was born frozen"
    assert all(m.training for m in run.model.modules())
    before = parameters(run.model)
    run.train(1)
    changed = moved(before, parameters(run.model))
    for index in range(DEPTH):
        mine = set(run.stack.parameters_of(index)) & born_trainable
        assert mine & changed or architecture.outside, f"block {index} did not thaw"
    for name in set(run.stack.prefix_parameters(DEPTH)) & changed:
        assert int(run.state(name)["step"]) == 1, f"{name} went on with old moments"


@every_architecture
def test_partial_thaw_moves_the_line_down(architecture: Architecture) -> None:
    run = Run(architecture)
    run.freeze(3)
    run.freeze(1)
    before = parameters(run.model)
    assert run.freezer.depth == 1
    run.train(2)
    changed = moved(before, parameters(run.model))
    assert not changed & set(run.stack.prefix_parameters(1))
    assert changed & set(run.stack.parameters_of(1))
    assert changed & set(run.stack.parameters_of(2))


@every_architecture
def test_resting_block_keeps_its_state_and_passes_gradients(architecture: Architecture) -> None:
    run = Run(architecture, "adamw")
    run.train(2)
    resting = run.stack.block_paths[2]
    rested = set(run.stack.parameters_of(2)) & run.trainable()
    kept = {n: copy.deepcopy(run.state(n)) for n in rested}
    run.freeze(1, resting)
    before = parameters(run.model)
    run.train(3)
    changed = moved(before, parameters(run.model))
    assert not changed & rested, "a resting parameter moved"
    assert changed & set(run.stack.parameters_of(1)), "no gradient passed through the resting block"
    assert changed & set(run.stack.parameters_of(3))
    assert run.model.get_submodule(resting).training, "a resting block keeps its mode"
    for name in rested:
        assert same_state(run.state(name), kept[name]), name
    run.freeze(1)
    before = parameters(run.model)
    run.train(2)
    assert moved(before, parameters(run.model)) & rested, "a rested block did not wake"


def test_resting_layer_inside_a_block() -> None:
    run = Run(BERT)
    layer = "bert.encoder.layer.2.attention.self.query"
    run.freeze(0, layer)
    before = parameters(run.model)
    run.train(2)
    changed = moved(before, parameters(run.model))
    assert not any(n.startswith(f"{layer}.") for n in changed)
    assert any(n.startswith("bert.encoder.layer.2.attention.self.value") for n in changed)
    assert any(n.startswith("bert.encoder.layer.0.") for n in changed)


@pytest.mark.parametrize("name", ["bert", "wav2vec2", "resnet", "t5", "lora-bert"])
def test_freezing_and_thawing_are_idempotent(name: str) -> None:
    once, twice = Run(BY_NAME[name], "adamw"), Run(BY_NAME[name], "adamw")
    for run, times in ((once, 1), (twice, 3)):
        transformers.set_seed(0)  # SpecAugment draws from numpy
        for depth in (0, 2, 0, 1, 3):
            for _ in range(times):
                run.freeze(depth)
            run.train(1)
    assert not moved(parameters(once.model), parameters(twice.model))
    assert once.optimizer.state_dict()["state"].keys() == twice.optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("architecture", [BERT, RESNET], ids=["bert", "resnet"])
def test_gradients_left_from_before_do_not_move_the_prefix(architecture: Architecture, optimizer: str) -> None:
    """Freeze between backward and step, and in the middle of an accumulation."""
    run = Run(architecture, optimizer)
    run.train(2)
    run.model(**architecture.inputs(seed=7)).loss.backward()
    run.freeze(DEPTH)
    before = parameters(run.model)
    run.model(**architecture.inputs(seed=8)).loss.backward()
    run.optimizer.step()
    changed = moved(before, parameters(run.model))
    assert not changed & set(run.stack.prefix_parameters(DEPTH))
    assert changed & set(run.stack.parameters_of(DEPTH))


@pytest.mark.parametrize("name", ["bert", "gpt2", "wav2vec2", "resnet"])
def test_evaluation_in_between_changes_nothing(name: str) -> None:
    """``eval()`` and back: active blocks return to train mode, the prefix stays in eval mode."""
    run = Run(BY_NAME[name])
    run.freeze(DEPTH)
    run.model.eval()
    with torch.no_grad():
        run.model(**run.architecture.inputs())
    assert not any(m.training for m in run.model.modules())
    run.model.train()
    assert all(not m.training for b in run.stack.blocks[:DEPTH] for m in b.modules())
    assert all(m.training for b in run.stack.blocks[DEPTH:] for m in b.modules())
    run.model.eval()
    run.freeze(1)
    assert not any(m.training for m in run.model.modules()), "moving the line while evaluating must not train()"


def test_a_forward_that_fails_leaves_the_modes_alone() -> None:
    """A model in eval mode up to the boundary must not stay there when its forward pass raises."""
    run = Run(BY_NAME["wav2vec2"])
    run.freeze(DEPTH)
    run.model.train()
    before = [m.training for m in run.model.modules()]
    with pytest.raises(RuntimeError):
        run.model(input_values=torch.randn(4, 2))
    assert [m.training for m in run.model.modules()] == before


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused", "adafactor", "adafactor-hf"])
def test_optimizer_state_saves_and_loads_while_frozen(optimizer: str) -> None:
    run, resumed = Run(BERT, optimizer), Run(BERT, optimizer)
    run.train(2)
    run.freeze(DEPTH)
    run.train(1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.freeze(DEPTH)
    resumed.optimizer.load_state_dict(saved)
    resumed.steps = run.steps
    for both in (run, resumed):
        torch.manual_seed(3)
        both.train(2)
    assert not moved(parameters(run.model), parameters(resumed.model))


def test_schedulers_go_on_over_a_freeze() -> None:
    run = Run(BERT, "adamw")
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (step + 1))
    groups = [len(g["params"]) for g in run.optimizer.param_groups]
    for depth in (0, 2, 1):
        run.freeze(depth)
        run.train(1)
        scheduler.step()
    assert [len(g["params"]) for g in run.optimizer.param_groups] == groups
    assert scheduler.get_last_lr() == [pytest.approx(1e-3 / 4)]


@pytest.mark.parametrize("name", ["bert", "wav2vec2"])
def test_a_copy_of_a_frozen_model_is_its_own(name: str) -> None:
    """``copy.deepcopy`` (EMA, best-model copies) must not share pins or switches with the original."""
    run = Run(BY_NAME[name])
    run.freeze(DEPTH)
    twin = copy.deepcopy(run.model)
    twin.train()
    assert all(m.training for m in run.stack.blocks[DEPTH].modules())
    run.model.eval()
    twin(**run.architecture.inputs()).loss.backward()
    assert not any(m.training for m in run.model.modules())
    run.freeze(0)
    run.model.train()
    twin.train()
    assert all(m.training for m in run.model.modules()), "the copy's pins act on the original"


def test_depths_and_names_that_do_not_exist_are_errors() -> None:
    run = Run(BERT)
    for depth in (-1, 4):
        with pytest.raises(ConfigError, match=r"0\.\.3"):
            run.freeze(depth)
    with pytest.raises(ConfigError, match=r"bert\.encoder\.layer\.1"):
        run.freeze(0, "bert.encoder.layers.1")
    with pytest.raises(ConfigError, match="nothing"):
        run.freezer.apply(Decision(3, frozenset({"bert.encoder.layer.3", "bert.pooler", "classifier"})))
    assert run.freezer.depth == 0
    assert all(p.requires_grad for p in run.model.parameters())
