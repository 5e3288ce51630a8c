"""What stands in autograd's graph: packed once, never the wrong tensor, and nothing lost of autograd's own checks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frostline.memory import Compressor, Level, compressing, saved
from frostline.memory.formats import Rows
from tests.memory.steps import everything_packs

WIDTH = 64


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with everything_packs():
        yield


class Notes:
    """A ledger that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, int]] = []

    def __call__(self, operation: str, role: object, nbytes: int) -> None:
        self.lines.append((operation, getattr(role, "name", ""), nbytes))


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))


def test_a_tensor_that_several_operations_save_is_packed_once() -> None:
    layers, notes = linears(3), Notes()
    x = torch.randn(32, WIDTH)
    with compressing(layers, "safe", notes):
        total = sum(layer(x).sum() for layer in layers)
    assert [line[0] for line in notes.lines] == ["linear"]
    total.backward()
    for layer in layers:
        assert torch.allclose(layer.weight.grad[0], x.sum(0), rtol=0.02, atol=0.2)


def test_a_view_of_it_in_another_order_is_packed_with_it() -> None:
    layer, notes = nn.Linear(WIDTH, WIDTH), Notes()
    x = torch.randn(WIDTH, WIDTH)
    with compressing(layer, "safe", notes):
        out = layer(x).sum() + layer(x.t()).sum()
    assert len(notes.lines) == 1
    out.backward()
    assert torch.allclose(layer.weight.grad[0], x.sum(0) + x.sum(1), rtol=0.02, atol=0.4)


def test_what_autocast_casts_for_each_layer_is_packed_once() -> None:
    layers, notes = linears(3), Notes()
    x = torch.randn(32, WIDTH)
    with compressing(layers, "safe", notes), torch.autocast("cpu", torch.bfloat16):
        total = sum(layer(x).sum() for layer in layers[:2])
        x.mul_(2.0)
        total = total + layers[2](x).sum()
    assert [line[0] for line in notes.lines] == ["linear", "linear"]
    total.backward()
    for layer, factor in zip(layers, (0.5, 0.5, 1.0), strict=True):
        assert torch.allclose(layer.weight.grad[0], factor * x.sum(0), rtol=0.02, atol=0.4)


def test_a_weight_that_was_made_is_not_taken_for_the_input() -> None:
    """It is cast as the input is, and here it has the same shape."""
    x, weight = (torch.randn(WIDTH, 8, 3, requires_grad=True) for _ in range(2))
    with compressing(nn.Linear(1, 1), "safe"), torch.autocast("cpu", torch.bfloat16):
        out = F.conv1d(x * 1.0, weight * 1.0)
    of_x, of_weight = torch.autograd.grad(out.float().sum(), (x, weight))
    assert torch.allclose(of_x[0], weight.sum(0), rtol=0.03, atol=0.3)
    assert torch.allclose(of_weight[0], x.sum(0), rtol=0.03, atol=0.3)


def test_a_mask_of_something_else_is_no_noise_of_a_dropout_that_drops_nothing() -> None:
    probabilities = F.softmax(torch.randn(8, 16, 16, requires_grad=True), -1)
    value, hidden = torch.randn(8, 16, 16, requires_grad=True), torch.rand(8, 16, 16) < 0.5
    with compressing(nn.Linear(1, 1), "safe"):
        given = F.softmax(probabilities, -1)
        other = given.masked_fill(hidden, 0.0)
        out = F.dropout(given, 0.0) @ value
    (gradient,) = torch.autograd.grad(out.sum() + other.sum(), value)
    assert torch.allclose(gradient, given.sum(1)[:, :, None].expand_as(value), atol=0.02)


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    """The temporaries of a loop get the same address over and over; each has its own gradient."""
    layers = linears(40)
    memory = np.empty((32, WIDTH), dtype=np.float32)  # what an allocator would give them, were it sure to
    addresses = set()
    with compressing(layers, "safe"):
        total = torch.zeros(())
        for i, layer in enumerate(layers):
            memory[:] = i
            temporary = torch.from_numpy(memory)
            addresses.add(temporary.data_ptr())
            total = total + layer(temporary).sum()
            del temporary
    assert len(addresses) == 1
    total.backward()
    for i, layer in enumerate(layers):
        assert torch.allclose(layer.weight.grad, torch.full_like(layer.weight, 32.0 * i), rtol=0.01), i


def test_a_weight_that_dies_does_not_leave_its_address_to_activations() -> None:
    notes = Notes()
    x = torch.randn(32, WIDTH, requires_grad=True)
    with compressing(linears(40), "safe", notes):  # the layers are gone as soon as the block begins
        out = [F.softmax(x + i, -1) for i in range(40)]
    assert len(notes.lines) == 40
    assert {role for _, role, _ in notes.lines} == {"PROBABILITIES"}
    sum(each.square().sum() for each in out).backward()


def test_a_tensor_written_between_two_uses_is_packed_twice() -> None:
    layers = linears(2)
    x = torch.ones(32, WIDTH)
    with compressing(layers, "safe"):
        total = layers[0](x).sum()
        x.mul_(3)
        total = total + layers[1](x).sum()
    total.backward()
    assert torch.allclose(layers[0].weight.grad, torch.full_like(layers[0].weight, 32.0), rtol=0.01)
    assert torch.allclose(layers[1].weight.grad, torch.full_like(layers[1].weight, 96.0), rtol=0.01)


def test_a_packed_tensor_may_be_written_after_it_was_saved() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.ones(32, WIDTH)
    with compressing(layer, "safe"):
        total = layer(x).sum()
    x.zero_()
    total.backward()
    assert torch.allclose(layer.weight.grad, torch.full_like(layer.weight, 32.0), rtol=0.01)


def test_a_whole_tensor_that_is_written_after_it_was_saved_is_an_error() -> None:
    """Hooks switch autograd's own check off; silently wrong gradients would follow."""
    x = torch.rand(32, WIDTH, requires_grad=True)
    with compressing(nn.Linear(1, 1), "safe"):
        y = (x * 1).exp()  # keeps its output as it is
        out = y.sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_weights_that_step_between_forward_and_backward_are_an_error() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.rand(32, WIDTH, requires_grad=True)
    with compressing(layer, "safe"):
        out = layer(x).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_a_pass_without_backward_leaves_nothing_behind() -> None:
    """An operation that saves its output would hold itself alive through a hook that hands the tensor back."""
    gone = []
    for _ in range(3):
        x = torch.rand(64, WIDTH, requires_grad=True)
        with compressing(nn.Linear(1, 1), "safe"):
            y = x.exp().softmax(-1)
        gone.append(weakref.ref(x))
        del x, y
    gc.disable()
    try:
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_backward_may_run_twice() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(32, WIDTH)
    with compressing(layer, "slimfit"):
        out = F.gelu(layer(x)).sum()
    out.backward(retain_graph=True)
    first = layer.weight.grad.clone()
    out.backward()
    assert torch.allclose(layer.weight.grad, 2 * first)


def test_a_second_derivative_of_recomputed_attention_is_refused() -> None:
    q = torch.randn(2, 2, 8, 16, requires_grad=True)
    with compressing(nn.Linear(1, 1), "safe"):
        out = F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize(
    "function", [F.gelu, F.silu, nn.GELU("tanh"), nn.SiLU()], ids=["gelu", "silu", "module-tanh", "module-silu"]
)
def test_activations_are_kept_as_codes_of_their_slope(function: Callable[[Tensor], Tensor]) -> None:
    """In any layout; what is handed on is exact. A call that works in place is left as it is."""
    notes = Notes()
    x = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last).requires_grad_(True)
    with compressing(nn.Linear(1, 1), "slimfit", notes):
        out = function(x)
    assert torch.equal(out, function(x))
    gradient = torch.randn_like(out)
    (exact,) = torch.autograd.grad(function(x), x, gradient)
    (found,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
    assert [(role, nbytes) for _, role, nbytes in notes.lines] == [("ACTIVATION", x.numel() // 2)]
    assert found.stride() == x.stride()
    assert ((found - exact).abs() <= 0.07 * gradient.abs()).all()
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.999
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with compressing(nn.Linear(1, 1), "slimfit"):
        done = F.silu(x * 1, inplace=True)
    assert torch.equal(done, F.silu(x))


def test_a_second_derivative_of_what_is_kept_whole_is_right() -> None:
    x = torch.rand(32, WIDTH, requires_grad=True)
    with compressing(nn.Linear(1, 1), "safe"):
        out = x.exp().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    slope.sum().backward()
    assert torch.allclose(x.grad, x.exp())


def test_strides_come_back() -> None:
    """Feature maps in channels-last order are packed in that order, and restored in it."""
    seen: list[Tensor] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x > 0, x)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            seen.extend(ctx.saved_tensors)
            return gradient * torch.ones_like(ctx.saved_tensors[1])

    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_(True)
    with compressing(nn.Linear(1, 1), "safe"):
        out = Look.apply(x)
    out.backward()
    mask, whole = seen
    assert torch.equal(mask, x > 0)
    assert mask.stride() == x.stride()
    assert torch.equal(whole, x), "what an unknown operation saves is kept exactly"


def test_a_small_piece_of_a_large_tensor_does_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "SMALL", 1 << 20)
    layer = nn.Linear(WIDTH, 2)
    hidden = torch.randn(16, 50, WIDTH)
    gone = weakref.ref(hidden.untyped_storage())
    with compressing(layer, "safe"):
        out = layer(hidden[:, 0]).sum()
    expected = hidden[:, 0].sum(0)
    del hidden
    assert gone() is None
    out.backward()
    assert torch.allclose(layer.weight.grad[0], expected, atol=1e-5)


def test_expanded_integers_and_empty_tensors_are_left_alone() -> None:
    table = nn.Embedding(10, WIDTH)
    notes = Notes()
    scale = torch.rand(1, WIDTH, requires_grad=True)
    with compressing(table, "safe", notes):
        rows = table(torch.randint(0, 10, (600,)))
        wide = torch.rand(600, 1).expand(600, WIDTH)
        out = (wide * scale).sum() + rows.sum() + (torch.empty(0, WIDTH) * scale).sum()
    out.backward()
    assert torch.allclose(scale.grad[0], wide.sum(0), rtol=1e-5)
    assert all(role in ("EXACT", "ELEMENTWISE") for _, role, _ in notes.lines)


def test_dropout_of_kept_probabilities_takes_no_room() -> None:
    notes = Notes()
    q = torch.randn(4, 32, 32, requires_grad=True)
    value = torch.randn(4, 32, WIDTH, requires_grad=True)

    def attend() -> Tensor:
        torch.manual_seed(1)
        return (torch.matmul(F.dropout(F.softmax(q, -1), 0.25), value) ** 2).sum()

    exact = torch.autograd.grad(attend(), (q, value))
    with compressing(nn.Linear(1, 1), "safe", notes):
        out = attend()
    found = torch.autograd.grad(out, (q, value))
    kept = {operation: nbytes for operation, role, nbytes in notes.lines if role == "PROBABILITIES"}
    assert kept == {"softmax": 4 * 32 * 32 + 4 * 32 * 32 // 128 * 2}  # and a scale of two bytes for each row
    matmul = [nbytes for operation, _, nbytes in notes.lines if operation == "matmul"]
    assert len(matmul) == 1, "the dropped probabilities were kept beside the value"
    for a, b in zip(found, exact, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999


def test_dropout_after_relu_is_not_taken_for_dropout_of_its_sign() -> None:
    up, down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    x = torch.randn(32, WIDTH)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return (down(F.dropout(F.relu(up(x)), 0.25)) ** 2).sum()

    (exact,) = torch.autograd.grad(loss(), down.weight)
    with compressing(nn.ModuleList((up, down)), "safe"):
        out = loss()
    (found,) = torch.autograd.grad(out, down.weight)
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.999
    assert torch.allclose(found, exact, atol=0.03 * float(exact.abs().max()))


def test_dropout_that_autocast_casts_is_not_taken_for_what_it_was() -> None:
    """Probabilities in fp32 are dropped in fp32 and cast for the layer that reads them, which saves the cast."""
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(32, WIDTH, requires_grad=True)

    def loss() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(F.dropout(F.softmax(x, -1, dtype=torch.float32), 0.25)).float().square().sum()

    exact = torch.autograd.grad(loss(), (x, layer.weight))
    with compressing(layer, "safe"):
        out = loss()
    for a, b in zip(torch.autograd.grad(out, (x, layer.weight)), exact, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "function",
    [F.leaky_relu, F.relu6, F.hardtanh, lambda x: F.hardtanh(x, -0.3, max_val=0.4)],
    ids=["leaky_relu", "relu6", "hardtanh", "hardtanh with other ends"],
)
def test_piecewise_linear_functions_have_exact_gradients_in_a_bit_each(function: Callable[[Tensor], Tensor]) -> None:
    """Values near a kink would land on its other side."""
    notes = Notes()
    x = (3 * torch.randn(32, WIDTH)).requires_grad_()
    x.data[0] = torch.linspace(-0.01, 0.01, WIDTH)
    (exact,) = torch.autograd.grad(function(x).sum(), x)
    with compressing(nn.Linear(1, 1), "safe", notes):
        out = function(x).sum()
    assert torch.equal(torch.autograd.grad(out, x)[0], exact)
    assert notes.lines[0][1:] == ("KINK", 32 * WIDTH // 8)


def test_arguments_may_be_named() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(32, WIDTH)
    with compressing(layer, "slimfit"):
        y = F.silu(input=F.gelu(input=layer(x), approximate="tanh"))
        out = torch.dropout(input=y, p=0.1, train=True).sum()
    out.backward()
    assert layer.weight.grad is not None


def test_jagged_tensors_are_left_alone() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    rows = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=torch.jagged)
    (exact,) = torch.autograd.grad(F.gelu(layer(rows)).values().sum(), layer.weight)
    with compressing(layer, "slimfit"):
        out = F.gelu(layer(rows)).values().sum()
    assert torch.equal(torch.autograd.grad(out, layer.weight)[0], exact)


def test_a_function_that_torch_refuses_is_refused_here() -> None:
    x = torch.randn(32, WIDTH, dtype=torch.complex64, requires_grad=True)
    with compressing(nn.Linear(1, 1), "slimfit"), pytest.raises(RuntimeError, match="complex"):
        F.silu(x)


def test_attention_inside_of_vmap() -> None:
    x = torch.randn(3, 2, 2, 16, 16, requires_grad=True)

    def loss() -> Tensor:
        return torch.func.vmap(lambda q: F.scaled_dot_product_attention(q, q, q) ** 2)(x).sum()

    (exact,) = torch.autograd.grad(loss(), x)
    for level in ("slimfit", "published"):
        with compressing(nn.Linear(1, 1), level):
            out = loss()
        found = torch.autograd.grad(out, x)[0]
        assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99


def test_a_pass_does_not_hold_its_model() -> None:
    model = nn.Sequential(*linears(2))
    dies = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        compressor = Compressor(model, "slimfit")
        model(torch.randn(32, WIDTH)).sum().backward()
        compressor.detach()
        del model, compressor
        assert dies() is None
    finally:
        gc.enable()


def test_a_backward_pass_inside_of_the_forward_pass() -> None:
    """A model that takes a gradient in its forward pass (forces, penalties)."""
    q = torch.randn(2, 2, 16, 16, requires_grad=True)
    exact = torch.autograd.grad((F.scaled_dot_product_attention(q, q, q) ** 2).sum(), q)[0]
    with compressing(nn.Linear(1, 1), "safe"):
        found = torch.autograd.grad((F.scaled_dot_product_attention(q, q, q) ** 2).sum(), q)[0]
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.999


def test_packed_queries_go_when_the_backward_pass_has_read_them() -> None:
    q = torch.randn(2, 2, 16, 16, requires_grad=True)
    with compressing(nn.Linear(1, 1), "safe"):
        out = F.scaled_dot_product_attention(q, q, q).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_packing_draws_no_random_numbers() -> None:
    x, model = torch.randn(64, WIDTH, requires_grad=True), nn.Linear(1, 1)
    torch.manual_seed(0)
    with compressing(model, "max"):
        F.gelu(F.layer_norm(x, (WIDTH,))).sum()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_what_is_not_asked_for_is_exact() -> None:
    """A level with one format compresses one role."""
    x = torch.randn(64, WIDTH)
    layer, only_norms = nn.Linear(WIDTH, WIDTH), Level("norms", "", norm=Rows(8), masks=False, slices=False)
    F.gelu(layer(x)).sum().backward()
    exact = layer.weight.grad.clone()
    layer.weight.grad = None
    with compressing(layer, only_norms):
        out = F.gelu(layer(x)).sum()
    out.backward()
    assert torch.equal(layer.weight.grad, exact)
