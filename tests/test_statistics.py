"""Statistics against numpy: L1 norm of the vector sum, per block; how far a step moved each layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from frostline.errors import ResumeError
from frostline.statistics import GradientSum, WeightChange


def _blocks(dtype: torch.dtype = torch.float32) -> dict[int, dict[str, nn.Parameter]]:
    shapes = {0: {"a.weight": (3, 4), "a.bias": (3,)}, 1: {"b.weight": (5, 3)}, 2: {"c.weight": (2, 2), "c.scale": ()}}
    return {
        block: {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in named.items()}
        for block, named in shapes.items()
    }


def _give(blocks: dict[int, dict[str, nn.Parameter]], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """New random gradients; returns them as the parameter's type rounds them."""
    given = {}
    for named in blocks.values():
        for name, parameter in named.items():
            gradient = torch.tensor(generator.standard_normal(parameter.shape)).to(parameter.dtype)
            parameter.grad = gradient
            given[name] = gradient.double().numpy()
    return given


def _norms(blocks: dict[int, dict[str, nn.Parameter]], steps: list[dict[str, np.ndarray]]) -> dict[int, float]:
    return {
        block: sum(float(np.abs(sum(step[name] for step in steps if name in step)).sum()) for name in named)
        for block, named in blocks.items()
    }


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]
)
def test_norm_of_the_vector_sum(dtype: torch.dtype, rel: float) -> None:
    """In 16 bits too: 200 small gradients would be lost in a 16-bit sum."""
    blocks, generator = _blocks(dtype), np.random.default_rng(0)
    statistic = GradientSum(blocks)
    steps = []
    for _ in range(200):
        steps.append(_give(blocks, generator))
        assert statistic.update()
    assert statistic.steps == 200
    assert statistic.norms() == pytest.approx(_norms(blocks, steps), rel=rel)


def test_opposite_gradients_cancel() -> None:
    """The norm of the sum, not the sum of the norms."""
    blocks = _blocks()
    statistic = GradientSum(blocks)
    for sign in (1.0, -1.0):
        for named in blocks.values():
            for parameter in named.values():
                parameter.grad = torch.full_like(parameter, sign)
        statistic.update()
    assert statistic.norms() == {0: 0.0, 1: 0.0, 2: 0.0}


def test_scale_and_missing_gradients() -> None:
    blocks, generator = _blocks(), np.random.default_rng(1)
    statistic = GradientSum(blocks)
    assert not statistic.update(), "no gradient at all: not a step"
    first = _give(blocks, generator)
    statistic.update(1 / 8)
    second = _give(blocks, generator)
    blocks[0]["a.bias"].grad = blocks[1]["b.weight"].grad = None
    statistic.update(1 / 8)
    steps = [{k: v / 8 for k, v in first.items()}, {k: v / 8 for k, v in second.items() if k[0] != "b"}]
    del steps[1]["a.bias"]
    assert statistic.norms() == pytest.approx(_norms(blocks, steps), rel=1e-6)
    assert statistic.steps == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflowed_step_is_left_out_only_where_asked(bad: float) -> None:
    blocks, generator = _blocks(), np.random.default_rng(2)
    statistic = GradientSum(blocks)
    steps = [_give(blocks, generator)]
    statistic.update(check=True)
    _give(blocks, generator)
    gradient = blocks[1]["b.weight"].grad
    assert gradient is not None
    gradient[0, 0] = bad
    assert not statistic.update(check=True)
    assert statistic.steps == 1
    assert statistic.norms() == pytest.approx(_norms(blocks, steps), rel=1e-6)
    statistic.update()
    assert not np.isfinite(statistic.norms()[1]), "without a scaler a bad gradient must show"
    assert np.isfinite(statistic.norms()[0])


def test_sparse_gradient() -> None:
    embedding = nn.Embedding(6, 2, sparse=True)
    statistic = GradientSum({0: {"weight": embedding.weight}})
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    statistic.update()
    statistic.update()
    assert statistic.norms() == {0: 12.0}


def test_reset_gives_back_the_memory_of_frozen_blocks() -> None:
    blocks, generator = _blocks(), np.random.default_rng(3)
    statistic = GradientSum(blocks)
    assert statistic.bytes() == 0
    _give(blocks, generator)
    statistic.update()
    assert statistic.bytes() == 4 * (12 + 3 + 15 + 4 + 1)
    statistic.reset([1, 2])
    assert statistic.bytes() == 4 * (15 + 4 + 1)
    assert statistic.norms() == {1: 0.0, 2: 0.0}
    assert statistic.steps == 0
    again = _give(blocks, generator)
    statistic.update()
    assert statistic.norms() == pytest.approx({b: v for b, v in _norms(blocks, [again]).items() if b}, rel=1e-6)


def test_round_trip() -> None:
    blocks, generator = _blocks(), np.random.default_rng(4)
    whole, first = GradientSum(blocks), GradientSum(blocks)
    for _ in range(3):
        _give(blocks, generator)
        whole.update()
        first.update()
    saved = {name: value.clone() for name, value in first.tensors().items()}
    second = GradientSum(blocks)
    second.load(saved, first.steps, range(3))
    _give(blocks, generator)
    whole.update()
    second.update()
    assert second.norms() == whole.norms()
    assert second.steps == whole.steps == 4
    assert all(torch.equal(first.tensors()[name], value) for name, value in saved.items()), "loading must copy"
    with pytest.raises(ResumeError, match=r"parameters this model lacks: z\.weight"):
        second.load({"z.weight": torch.zeros(2)}, 1, range(3))
    with pytest.raises(ResumeError, match=r"gradient sum of b\.weight: shape \(2,\), model \(5, 3\)"):
        second.load({"b.weight": torch.zeros(2)}, 1, range(3))


@pytest.mark.parametrize("shape", [(40, 30), (3000, 768), (2**21,)])
@pytest.mark.parametrize("rows", [1.0, 0.05], ids=["all rows move", "few rows move"])
def test_the_change_of_a_layer_is_that_of_all_of_its_values(shape: tuple[int, ...], rows: float) -> None:
    """Of a large layer some values are compared, so that their copy is small."""
    generator = np.random.default_rng(0)
    layer = nn.Parameter(torch.tensor(generator.standard_normal(shape), dtype=torch.float32))
    moved = torch.tensor(generator.standard_normal(shape), dtype=torch.float32) * 1e-3
    moved *= torch.tensor(generator.random(shape[0]) < rows).view(-1, *[1] * (len(shape) - 1))
    expected = float(moved.double().abs().sum() / layer.detach().double().abs().sum())
    layer.grad = torch.ones_like(layer)
    change = WeightChange({"layer": layer})
    change.before()
    kept = sum(copy.numel() for copy in change._before.values())
    with torch.no_grad():
        layer += moved
    found = change.after()
    assert found is not None
    assert kept == layer.numel() or kept <= 2**19
    assert found["layer"] == pytest.approx(expected, rel=1e-5 if kept == layer.numel() else 0.02)


def test_large_layers_in_another_order_of_memory_are_compared_whole() -> None:
    layer = nn.Parameter(torch.ones(2048, 1024).t())
    layer.grad = torch.ones_like(layer)
    change = WeightChange({"layer": layer})
    change.before()
    with torch.no_grad():
        layer *= 1.5
    assert change.after() == pytest.approx({"layer": 0.5})
