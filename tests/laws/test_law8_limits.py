"""Law 8: nothing is silent. What cannot be done for a model is a clear error or a reported limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import frostline
from frostline.blocks import BlockStack
from frostline.errors import ModelError
from tests.architectures import ARCHITECTURES, REFUSED, Architecture
from tests.laws.loops import OPTIMIZERS, crossing, installed

BY_NAME = {a.name: a for a in (*ARCHITECTURES, *REFUSED)}
TIED = [a for a in ARCHITECTURES if a.tied]
UNTIED = [a for a in ARCHITECTURES if not a.tied]
PLAN: dict[str, Any] = {"steps_per_epoch": 3, "epochs": 2, "batch_size": 4}


def find(name: str, path: str | None = None) -> BlockStack:
    architecture = BY_NAME[name]
    return BlockStack.find(architecture.build(), path or architecture.path)


def freeze(model: nn.Module, **options: Any) -> frostline.Frostline:
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    return frostline.Frostline(model, optimizer, policy="static", depth=2, **PLAN, **options)


# -- the stack itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_stack_is_found(architecture: Architecture) -> None:
    model = architecture.build()
    stack = BlockStack.find(model, architecture.path)
    assert len(stack) == len(stack.blocks) == len(stack.block_paths) == architecture.blocks
    assert architecture.stack in (None, stack.path)
    assert [model.get_submodule(p) for p in stack.block_paths] == stack.blocks
    assert all(p.startswith(f"{stack.path}.") for p in stack.block_paths)
    # Every parameter has exactly one owner, and a block owns at least what is inside it.
    names = [n for n, _ in model.named_parameters()]
    owned = [n for owner in ("stem", *range(len(stack)), "head") for n in stack.parameters_of(owner)]
    assert sorted(owned) == sorted(names)
    for index, path in enumerate(stack.block_paths):
        assert {n for n in names if n.startswith(f"{path}.")} <= set(stack.parameters_of(index))
    assert stack.parameters_of("stem")
    assert stack.parameters_of("head")
    assert stack.prefix_parameters(0) == {}
    assert set(stack.prefix_parameters(2)) == {n for o in ("stem", 0, 1) for n in stack.parameters_of(o)}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_blocks_run_once_each_in_order(architecture: Architecture) -> None:
    model = architecture.build().eval()
    stack = BlockStack.find(model, architecture.path)
    order: list[int] = []
    for index, block in enumerate(stack.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: order.append(index))
    with torch.no_grad():
        model(**architecture.inputs())
    assert order == list(range(architecture.blocks))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_owners_are_what_autograd_says(architecture: Architecture) -> None:
    """Whatever feeds the block at the frost line (hidden state, mask, bias) lies below it, and nothing else does."""
    model = architecture.build().eval().requires_grad_(True)
    stack = BlockStack.find(model, architecture.path)
    for depth in range(1, len(stack)):
        with crossing(stack.blocks[depth]) as seen:
            model(**architecture.inputs())
        found: set[str] = set()
        named = dict(model.named_parameters())
        for tensor in seen[0]:
            if tensor.requires_grad:
                gradients = torch.autograd.grad(
                    tensor.sum(), list(named.values()), allow_unused=True, retain_graph=True
                )
                found |= {n for n, g in zip(named, gradients, strict=True) if g is not None}
        below = set(stack.prefix_parameters(depth))
        assert found <= below, f"depth {depth}: {sorted(found - below)} feed the active part but would train"
        idle = {n for n in below - found if n.rpartition(".")[2] not in ("mask_token", "masked_spec_embed")}
        assert not idle, f"depth {depth}: {sorted(idle)} do not feed the prefix but would freeze"


@pytest.mark.parametrize(
    ("name", "parameter", "owner"),
    [
        ("mpnet", "mpnet.encoder.relative_attention_bias.weight", "stem"),
        ("deberta-v2", "deberta.encoder.rel_embeddings.weight", "stem"),
        ("electra", "electra.embeddings_project.weight", "stem"),
        ("gpt2", "transformer.wpe.weight", "stem"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),
        ("t5", "decoder.block.0.layer.0.SelfAttention.q.weight", "head"),
        ("bart", "model.decoder.layers.0.fc1.weight", "head"),
        ("wav2vec2", "wav2vec2.feature_projection.projection.weight", "stem"),
        ("wav2vec2", "wav2vec2.encoder.pos_conv_embed.conv.bias", "stem"),
        ("convnext", "convnext.encoder.stages.1.downsampling_layer.1.weight", 1),
        ("lora-bert", "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.default.weight", 1),
    ],
)
def test_what_name_rules_miss(name: str, parameter: str, owner: int | str) -> None:
    assert find(name).owner(parameter) == owner


def test_finding_a_stack_leaves_the_model_untouched() -> None:
    for architecture in ARCHITECTURES:
        model = architecture.build()
        with torch.no_grad():
            model(**architecture.inputs())  # some of transformers' models install recorders of their own on first use
        state = {k: v.clone() for k, v in model.state_dict().items()}
        before, torch_state, numpy_state = installed(model), torch.get_rng_state(), np.random.get_state()[1].copy()
        BlockStack.find(model, architecture.path, ((), architecture.inputs()))
        BlockStack.find(model, architecture.path)
        assert torch.equal(torch.get_rng_state(), torch_state), architecture
        assert (np.random.get_state()[1] == numpy_state).all(), architecture
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), architecture
        assert all(m.training for m in model.modules()), architecture
        assert all(p.grad is None for p in model.parameters()), architecture
        assert installed(model) == before, architecture


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", REFUSED, ids=repr)
def test_models_that_cannot_be_frozen_by_depth_are_refused(architecture: Architecture) -> None:
    with pytest.raises(ModelError, match=architecture.error) as caught:
        BlockStack.find(architecture.build())
    assert "\n" not in str(caught.value), "an error is one line"
    with pytest.raises(ModelError, match=architecture.error):
        freeze(architecture.build())


def test_shared_block_named_by_path_is_refused() -> None:
    with pytest.raises(ModelError):
        find("albert", "albert.encoder.albert_layer_groups")


def test_stack_that_only_a_path_names_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelError, match=r"trunk\.cells"):
        BlockStack.find(BY_NAME["plain"].build())


def test_path_that_does_not_match_names_the_close_ones() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'bert\.encoder\.layer'"):
        find("bert", "bert.encoder.layers")
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer"):
        freeze(BY_NAME["bert"].build(), blocks="encoder.layer")


def test_path_to_something_else_than_a_list_is_an_error() -> None:
    with pytest.raises(ModelError, match="ModuleList"):
        find("bert", "bert.pooler")


def test_data_parallel_is_refused_with_the_torchrun_command() -> None:
    model = nn.DataParallel(BY_NAME["bert"].build())
    with pytest.raises(ModelError, match="torchrun"):
        freeze(model)
    assert all(p.requires_grad for p in model.parameters())


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TIED, ids=repr)
def test_tied_embeddings_are_reported(architecture: Architecture) -> None:
    stack = BlockStack.find(architecture.build())
    head = "lm_head.weight"
    assert any(head in limit and "same tensor" in limit for limit in stack.limits), stack.limits


@pytest.mark.parametrize("architecture", UNTIED, ids=repr)
def test_untied_models_have_no_limit(architecture: Architecture) -> None:
    assert BlockStack.find(architecture.build(), architecture.path).limits == []


def test_untying_takes_the_limit_away() -> None:
    model = BY_NAME["llama-lm"].build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    stack = BlockStack.find(model)
    assert stack.limits == []
    assert stack.owner("lm_head.weight") == "head"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_stacks_are_reported_and_the_other_can_be_chosen(name: str) -> None:
    first = find(name)
    other = first.path.replace("encoder", "decoder")
    assert any(first.path in limit and other in limit for limit in first.limits)
    assert find(name, other).path == other


def test_limits_reach_the_log_and_the_summary(tmp_path: Any) -> None:
    frost = freeze(BY_NAME["gpt2"].build(), events=tmp_path / "events.jsonl")
    [limit] = [e for e in frostline.events.read_events(tmp_path / "events.jsonl") if e["event"] == "limit"]
    assert "lm_head.weight" in limit["message"]
    assert frost.summary()["limits"] == [limit["message"]]
