"""Compression over the matrix of architectures: forward values are exact, gradients are near, nothing else moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from frostline.blocks import BlockStack
from frostline.errors import ConfigError, ModelError
from frostline.memory import LEVELS, Compressor, compressing, footprint
from frostline.memory import attention as recomputing
from frostline.memory.codebook import _book
from tests.architectures import ARCHITECTURES, Architecture
from tests.memory.steps import cosine, everything_packs, packed_roles, run

BY_NAME = {a.name: a for a in ARCHITECTURES}
NEAR = {"safe": 0.999, "slimfit": 0.99, "max": 0.97, "published": 0.9}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with everything_packs():
        yield


@pytest.fixture
def packed() -> Iterator[list[str]]:
    with packed_roles() as found:
        yield found


@pytest.mark.parametrize("level", sorted(set(LEVELS) - {"off"}))
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_loss_is_exact_and_gradients_are_near(architecture: Architecture, level: str, packed: list[str]) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    exact = run(model, inputs, None)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    found = run(model, inputs, level)
    assert torch.equal(found.loss, exact.loss)
    assert found.gradients.keys() == exact.gradients.keys()
    assert torch.equal(found.random, exact.random), "the random state after a step is not what it was"
    assert cosine(found.gradients, exact.gradients) >= NEAR[level]
    assert packed, "nothing was packed: the test shows nothing"
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama-classes", "vit", "resnet"])
def test_resting_layers_keep_less(name: str) -> None:
    architecture = BY_NAME[name]
    model, inputs = architecture.build(), architecture.inputs()
    stack = BlockStack.find(model, architecture.path)
    call = ((), inputs)
    whole = {level: footprint(model, stack.blocks, call, level).total for level in ("off", "slimfit")}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in parameter_name or "class" in parameter_name)
    resting = {level: footprint(model, stack.blocks, call, level).total for level in ("off", "slimfit")}
    assert resting["off"] < whole["off"]
    assert resting["slimfit"] < whole["slimfit"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_recomputed_attention_is_attention(mask: str, dropout: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 64, 32, generator=generator).requires_grad_(True) for _ in range(3))
    options: dict[str, Any] = {"dropout_p": dropout}
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, 64, 64, generator=generator) < 0.8
    elif mask == "float":
        options["attn_mask"] = torch.randn(2, 1, 64, 64, generator=generator)

    class Attend(nn.Module):
        def forward(self) -> Any:
            return F.scaled_dot_product_attention(q, k, v, **options)

    def gradients(level: str | None) -> Any:
        torch.manual_seed(5)
        model = Attend().train()
        compressor = Compressor(model, level) if level else None
        out = model()
        if compressor is not None:
            compressor.detach()
            assert type(out.grad_fn).__name__ == "_RecomputedBackward"
        return out.detach(), torch.autograd.grad((out**2).sum(), (q, k, v)), torch.rand(1)

    out, exact, after = gradients(None)
    same, found, then = gradients("safe")
    assert torch.equal(out, same)
    assert torch.equal(after, then), "the backward pass moved the random state"
    for a, b in zip(found, exact, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9995


def test_recomputed_attention_runs_in_the_precision_of_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast has ended when the backward pass runs."""
    seen: list[tuple[bool, torch.dtype]] = []
    original = recomputing.attention

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(*args, **kwargs)
        seen.append((torch.is_autocast_enabled("cpu"), out.dtype))
        return out

    monkeypatch.setattr(recomputing, "attention", noted)
    q = torch.randn(2, 4, 64, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = recomputing.recomputed_attention(q, q, q)
    out.float().square().sum().backward()
    assert seen == [(True, torch.bfloat16)] * 2
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_making_a_code_book_is_no_part_of_the_pass_that_asks_for_it() -> None:
    architecture = BY_NAME["bert"]
    model, inputs = architecture.build(), architecture.inputs()
    stack = BlockStack.find(model)
    _book.cache_clear()
    first, second = (footprint(model, stack.blocks, ((), inputs), "slimfit").total for _ in range(2))
    assert first == second


def test_a_learned_bias_of_attention_gets_its_gradient() -> None:
    q = torch.randn(2, 2, 16, 16, requires_grad=True)
    bias = torch.randn(1, 2, 16, 16, requires_grad=True)

    class Attend(nn.Module):
        def forward(self) -> Any:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=bias)

    model = Attend().train()
    exact = torch.autograd.grad((model() ** 2).sum(), bias)[0]
    Compressor(model, "safe")
    found = torch.autograd.grad((model() ** 2).sum(), bias)[0]
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama-classes", "vit"])
def test_checkpointed_blocks_are_left_to_checkpointing(name: str, reentrant: bool) -> None:
    architecture = BY_NAME[name]
    model, inputs = architecture.build(), architecture.inputs()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    exact, found = run(model, inputs, None), run(model, inputs, "slimfit")
    assert torch.equal(found.loss, exact.loss)
    assert cosine(found.gradients, exact.gradients) >= 0.999


@pytest.mark.parametrize("name", ["bert", "llama-classes", "vit"])
def test_autocast(name: str, packed: list[str]) -> None:
    """Weights that autocast has cast are not activations; recomputed attention runs in the same precision."""
    architecture = BY_NAME[name]
    model, inputs = architecture.build(), architecture.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        exact = run(model, inputs, None)
        found = run(model, inputs, "safe")
    assert torch.equal(found.loss, exact.loss)
    assert cosine(found.gradients, exact.gradients) >= 0.998
    assert packed


def test_weights_that_autocast_cast_are_kept_as_they_are(packed: list[str]) -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(64, 64, requires_grad=True)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    net = Net().train()
    Compressor(net, "safe")
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    out.sum().backward()
    assert not packed


def test_only_training_passes_are_compressed(packed: list[str]) -> None:
    architecture = BY_NAME["bert"]
    model, inputs = architecture.build(), architecture.inputs()
    compressor = Compressor(model, "safe")
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs).loss.backward()
    assert not packed
    model.train()
    model(**inputs).loss.backward()
    assert packed
    packed.clear()
    compressor.detach()
    model(**inputs).loss.backward()
    assert not packed
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_pass_that_fails_takes_its_hooks_along() -> None:
    architecture = BY_NAME["bert"]
    model, inputs = architecture.build(), architecture.inputs()
    Compressor(model, "safe")
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + 10_000)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch._C._len_torch_function_stack() == 0
    model(**inputs).loss.backward()


def test_where_nothing_may_watch_what_is_saved_no_mode_of_anybody_else_ends() -> None:
    model = nn.Linear(4, 4)
    Compressor(model, "safe")
    with torch.device("cpu"):  # is a mode
        before = torch._C._len_torch_function_stack()
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            torch.func.grad(lambda x: model(x).sum())(torch.randn(4))
        assert torch._C._len_torch_function_stack() == before
    model(torch.randn(2, 4)).sum().backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Summed(nn.Module):
    """Products of activations with each other and with a weight, as einsum writes them."""

    def __init__(self, *, listed: bool) -> None:
        super().__init__()
        self.before, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8))
        self.listed = listed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.before(x)
        factors = (h, h.tanh())
        scores = torch.einsum("bld,bmd->blm", list(factors)) if self.listed else torch.einsum("bld,bmd->blm", *factors)
        return torch.einsum("blm,bmd,cd->blc", scores, h, self.weight)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_factors_of_einsum_are_packed_and_its_weights_are_not(
    listed: bool, precision: torch.dtype, packed: list[str]
) -> None:
    torch.manual_seed(0)
    model, x = Summed(listed=listed), torch.randn(2, 5, 8)
    found = []
    for level in ("off", "safe"):
        model.zero_grad()
        with compressing(model, level), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = model(x)
        out.float().square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert packed.count("MATMUL") == (0 if level == "off" else 5)
    assert cosine(found[1], found[0]) >= 0.999


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights asked for"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_parts_of_multi_head_attention_are_packed(weights: bool, dropout: float, packed: list[str]) -> None:
    """torch hands it over as one operation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = x.tanh()
            return self.attention(hidden, hidden, hidden, need_weights=weights)[0]

    torch.manual_seed(0)
    model, x = Net().train(), torch.randn(4, 16, 32, requires_grad=True)
    found, outs = [], []
    for level in ("off", "safe"):
        torch.manual_seed(1)
        model.zero_grad()
        with compressing(model, level):
            outs.append(model(x))
        outs[-1].square().sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert ("LINEAR" in packed) == (level == "safe")
    assert torch.equal(*outs)
    assert cosine(found[1], found[0]) >= 0.999
    assert ({"MATMUL", "PROBABILITIES"} if weights else {"ATTENTION"}) <= set(packed)
    assert torch._C._len_torch_function_stack() == 0


def test_an_interrupt_leaves_nothing_behind() -> None:
    """Ctrl-C does not run the hooks that end a pass."""
    architecture = BY_NAME["bert"]
    model, inputs = architecture.build(), architecture.inputs()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for ends in ("detach", "next pass"):
        compressor = Compressor(model, "safe")
        handle = model.classifier.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        if ends == "next pass":
            model(**inputs)
            assert torch._C._len_torch_function_stack() == 0
        compressor.detach()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert torch._C._len_torch_function_stack() == 0


def test_a_loop_may_call_an_inner_module(packed: list[str]) -> None:
    """Lightning calls training_step, which calls the model inside of the LightningModule."""
    architecture = BY_NAME["bert"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = architecture.build()

    model = Wrapper().train()
    Compressor(model, "safe", entries=BlockStack.find(model).ancestors())
    model.inner(**architecture.inputs()).loss.backward()
    assert packed


def test_a_pass_inside_of_a_pass_does_not_end_it(packed: list[str]) -> None:
    """The cache runs the model without gradients in the middle of a training pass."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
            if again:
                with torch.no_grad():
                    self(x, again=False)
            return self.layer(x)

    model = Twice().train()
    Compressor(model, "safe")
    model(torch.randn(8, 16)).sum().backward()
    assert packed == ["LINEAR"]


def test_unknown_levels_and_compiled_models_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="unknown memory level 'slim'.*slimfit"):
        Compressor(model, "slim")
    with pytest.raises(ModelError, match="compiled"):
        Compressor(torch.compile(model), "safe")
    compiled = nn.Linear(2, 2)
    compiled.compile()
    with pytest.raises(ModelError, match="compiled"):
        Compressor(compiled, "safe")
    with pytest.raises(ModelError, match="compiled blocks"):
        Compressor(nn.Sequential(nn.Linear(2, 2), compiled), "safe")


def test_a_mask_that_recomputed_attention_holds_is_counted_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return x

    x, mask = torch.randn(2, 2, 16, 8, requires_grad=True), torch.zeros(2, 1, 16, 16)
    kept: dict[str, int] = {}
    for name, given in (("with", mask), ("without", None)):
        counted: list[int] = []
        model = Twice()
        with compressing(model, "safe", lambda operation, role, nbytes, into=counted: into.append(nbytes)):
            out = model(x, given)
        kept[name] = sum(counted)
        del out
    assert kept["with"] - kept["without"] == mask.nbytes
