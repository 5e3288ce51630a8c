"""Attention that is computed again: its derivative, by finite differences, in every way in which it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.memory import attention
from frostline.memory.attention import recomputed_attention

HEADS, LENGTH, WIDTH = 2, 5, 4


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, HEADS, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    )
    return query, key, value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
        {"attn_mask": torch.linspace(-1, 1, LENGTH, dtype=torch.float64).expand(LENGTH, LENGTH)},
        {"dropout_p": 0.3},
        {"dropout_p": 0.3, "is_causal": True},
        {"dropout_p": 0.3, "scale": 0.3, "attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
        {"dropout_p": 0.3, "attn_mask": torch.linspace(-1, 1, 2 * LENGTH, dtype=torch.float64).view(2, 1, 1, LENGTH)},
        {"dropout_p": 0.3, "attn_mask": (torch.arange(2 * LENGTH) % 7 > 0).view(2, 1, 1, LENGTH)},
        {"dropout_p": 0.3, "attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.bool)},
        {"dropout_p": 0.3, "scale": -0.3},
        {"dropout_p": 1.0},
    ],
    ids=[
        "plain",
        "causal",
        "scaled",
        "mask",
        "bias",
        "dropout",
        "dropout-causal",
        "dropout-scaled-mask",
        "dropout-bias",
        "dropout-padding",
        "dropout-nothing-seen",
        "dropout-negative-scale",
        "all-dropped",
    ],
)
@pytest.mark.parametrize("part", [1, attention._PART], ids=["row by row", "all rows"])
def test_its_gradients_are_those_of_finite_differences(
    options: dict[str, Any], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PART", part)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout at each of the many evaluations
        return recomputed_attention(query, key, value, **options)

    assert torch.autograd.gradcheck(run, inputs())


@pytest.mark.parametrize("trains", [(True, False, False), (False, True, False), (False, False, True)])
def test_so_are_they_where_only_some_inputs_train(trains: tuple[bool, ...]) -> None:
    given = [tensor.detach().requires_grad_(train) for tensor, train in zip(inputs(), trains, strict=True)]
    assert torch.autograd.gradcheck(recomputed_attention, given)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_mask_that_is_written_before_the_backward_pass_is_an_error(dropout: float) -> None:
    """It is read again there; one that is used for the next layer would silently give wrong gradients."""
    query, key, value = inputs()
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    out = recomputed_attention(query, key, value, attn_mask=mask, dropout_p=dropout).sum()
    mask.fill_(-1e9).fill_diagonal_(0.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


@pytest.mark.parametrize("part", [1, attention._PART], ids=["row by row", "all rows"])
def test_keys_that_all_rows_share(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PART", part)
    query, key, value = inputs()
    shared = [query, key, value[:1].detach().requires_grad_()]
    found = []
    for attend in (attention.attention, recomputed_attention):
        torch.manual_seed(0)
        found.append(torch.autograd.grad((attend(*shared, dropout_p=0.3) ** 2).sum(), shared))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other)


def test_a_batch_without_rows() -> None:
    query, key, value = (tensor[:0].detach().requires_grad_() for tensor in inputs())
    recomputed_attention(query, key, value, dropout_p=0.3).sum().backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape
