"""Formats give back what they promise, for any count of values, and never touch what they were given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frostline.memory.codebook import FUNCTIONS, CodeBook
from frostline.memory.formats import Bits, FixedPoint, Format, Noise, Packed, Product, Pruned, Rows, Sides

COUNTS = [1, 127, 128, 129, 5000, 128 * 2048 + 77]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

everyone = pytest.mark.parametrize(
    "how",
    [
        Rows(8),
        Rows(4),
        Rows(8, False),
        FixedPoint(3, 4),
        FixedPoint(2, 1),
        Bits(),
        Sides(0.0, 6.0),
        Noise(),
        *map(CodeBook, FUNCTIONS),
    ],
    ids=repr,
)


def there_and_back(how: Format, values: Tensor) -> Tensor:
    before = values.clone()
    content = Packed(how, values)
    assert torch.equal(values, before), "packing changed what it was given"
    first, second = content.restore(), content.restore()
    assert first.dtype == values.dtype
    assert first.shape == values.shape
    assert torch.equal(first, second)
    if first.numel():
        first.fill_(7)
        assert torch.equal(content.restore(), second), "what is restored shares memory with what is kept"
    return second


@everyone
@pytest.mark.parametrize("count", COUNTS)
def test_any_count_comes_back(how: Format, count: int) -> None:
    values = torch.rand(count)
    assert there_and_back(how, values).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_err_by_half_a_step_of_their_own_largest_value(bits: int, dtype: torch.dtype) -> None:
    values = (torch.randn(300, 128) * torch.logspace(-6, 3, 300).unsqueeze(1)).to(dtype)
    back = there_and_back(Rows(bits), values.view(-1)).view(300, 128)
    top = 2 ** (bits - 1) - 1
    largest = values.float().abs().amax(1, keepdim=True)
    # Half a step, the rounding of the scale (one part in 256 of a value), and that of the dtype itself.
    allowed = largest * (0.5 / top + 1 / 200) + torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
    assert ((back.float() - values.float()).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_rows_that_are_not_finite(bits: int) -> None:
    values = torch.ones(4, 128)
    values[1] = 0
    values[2, 5] = torch.inf
    values[3, 5] = torch.nan
    back = there_and_back_any(Rows(bits), values.view(-1)).view(4, 128)
    assert torch.allclose(back[0], torch.ones(128), atol=0.01)
    assert (back[1] == 0).all()
    assert not back[2].isfinite().any()
    assert not back[3].isfinite().any()


def there_and_back_any(how: Format, values: Tensor) -> Tensor:
    return Packed(how, values).restore()


def test_probabilities_err_by_half_a_step_of_the_largest_near_them() -> None:
    """Attention over many tokens is flat: with one scale for all, small probabilities would vanish."""
    values = torch.rand(100, 128) / torch.logspace(0, 3, 100).unsqueeze(1)
    back = there_and_back(Rows(8, signed=False), values.view(-1)).view(100, 128)
    largest = values.amax(1, keepdim=True)
    assert ((back - values).abs() <= largest * (0.5 / 255 + 1 / 200)).all()
    assert (back >= 0).all()


@pytest.mark.parametrize(
    ("how", "low", "high", "step"),
    [
        (FixedPoint(2, 1), -4, 3.5, 0.5),
        (FixedPoint(3, 4), -8, 127 / 16, 1 / 16),
        (FixedPoint(0, 8, False), 0, 255 / 256, 1 / 256),
    ],
    ids=repr,
)
def test_fixed_point_has_the_published_range_and_step(how: FixedPoint, low: float, high: float, step: float) -> None:
    values = torch.linspace(-12, 12, 9_001)
    back = there_and_back(how, values)
    assert ((back - values.clamp(low, high)).abs() <= step / 2 + 1e-6).all()
    assert back.min() == low
    assert back.max() == high
    assert back.unique().numel() == 2**how.bits


@pytest.mark.parametrize("count", COUNTS)
def test_truth_and_noise_are_exact(count: int) -> None:
    mask = torch.rand(count) < 0.3
    assert torch.equal(there_and_back_any(Bits(), mask), mask)
    noise = (torch.rand(count) < 0.9).float().div_(0.9)
    assert torch.equal(there_and_back(Noise(), noise), noise)
    assert torch.equal(there_and_back(Noise(), torch.zeros(count)), torch.zeros(count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinks", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (0.1, 0.9), (1003.0, 2000.0)])
def test_sides_of_kinks_are_exact(kinks: tuple[float, float], dtype: torch.dtype) -> None:
    low, high = kinks
    values = torch.tensor([low, high, low - 0.5, low + 0.5, 0.0, -0.0, 3.0, 1e4, -1e4]).to(dtype)
    found = there_and_back(Sides(low, high), values)
    assert torch.equal((found > low) & (found < high), (values > low) & (values < high))


def test_a_product_is_what_dropout_made_and_takes_no_room() -> None:
    values, keep = torch.rand(1_000), torch.rand(1_000) < 0.8
    noise = keep.float() / 0.8
    exact = there_and_back(Rows(8), values)
    for mask, how in ((noise, Noise()), (keep, Bits())):
        product = Product(Packed(Rows(8), values), Packed(how, mask), 1 / 0.8)
        assert product.nbytes == 0
        assert torch.allclose(product.restore(), exact * noise)
        assert torch.allclose(product.restore(), exact * noise), "restoring once changed what is kept"


def test_pruning_keeps_the_largest_tenth_of_the_normalised_values() -> None:
    width = 50
    values = torch.randn(40, width) * 3 + 1
    back = there_and_back(Pruned(width), values.view(-1)).view(40, width)
    mean, deviation = values.mean(1, keepdim=True), (values.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    exact, seen = (values - mean) / deviation, (back - mean) / deviation
    kept = seen.abs() > 1e-4
    assert (kept.sum(1) == width // 10).all()
    assert torch.allclose(seen[kept], exact[kept], atol=1e-4)
    assert (exact.abs().masked_fill(~kept, torch.inf).amin(1) >= exact.abs().masked_fill(kept, 0).amax(1)).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_code_book_hands_back_nearly_the_derivative(function: str) -> None:
    x = torch.linspace(-20, 20, 40_001)
    exact, seen = derivative(function, x), there_and_back(CodeBook(function), x)
    # Levels lie a twelfth apart up to 1, and the largest slope is the next: half a gap is the most one may be off.
    assert (seen - exact).abs().max() <= max(1 / 24, (float(exact.max()) - 1) / 2) + 1e-4
    assert seen.unique().numel() == 16
    dead, linear = seen[x < -15], seen[x > 15]
    assert (dead == 0).all(), "a dead unit must have a derivative of exactly 0: what all share adds up"
    assert (linear == 1).all()


def derivative(function: str, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(FUNCTIONS[function](x).sum(), x)
    return found


@pytest.mark.parametrize(
    ("how", "share"), [(Rows(8), 4), (Rows(4), 8), (Rows(8, False), 4), (Noise(), 32), (CodeBook("gelu"), 8)], ids=repr
)
def test_formats_are_as_small_as_they_say(how: Format, share: float) -> None:
    values = torch.rand(128 * 1000)
    assert values.numel() * 4 / Packed(how, values).nbytes == pytest.approx(share, rel=0.07)
