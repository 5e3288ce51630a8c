"""What the memory model says of a step is what the step takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from frostline import BlockStack
from frostline.distributed import Buckets
from frostline.errors import ModelError
from frostline.freezer import Freezer
from frostline.memory import Bench, LiveBytes, MemoryModel, OptimizerCost, Way, optimizer_cost
from frostline.memory.model import nbytes_of
from frostline.policies.base import Decision

WAYS = (Way(), Way("safe"), Way("slimfit"), Way(checkpointing=True))
ROWS, LENGTH = 24, 32


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 500, (rows, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def bench_of(stack: BlockStack) -> Bench:
    return Bench(stack, batch, lambda inputs: stack.model(**inputs).loss)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def whole_step(bench: Bench, way: Way, rows: int) -> int:
    """Bytes alive at the peak of a second optimizer step, with all moments there."""
    model, inputs = bench.model, batch(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained)
    state: list[torch.Tensor] = []
    with bench.ready(way):
        for number in range(2):
            model.zero_grad(set_to_none=True)
            state = [v for s in optimizer.state.values() for v in s.values()]
            with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values(), *state]) as live:
                loss = bench.forward(way, inputs)
                loss.backward()
                optimizer.step()
            if number:
                return live.peak
            del loss
    raise AssertionError


@pytest.mark.parametrize("depth", [0, 3, 5])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_predicted_peak_is_the_measured_one(way: Way, depth: int) -> None:
    model = bert()
    stack = BlockStack.find(model)
    cost = optimizer_cost(adamw, stack.parameters_of(5)["bert.encoder.layer.5.intermediate.dense.weight"])
    predicted = MemoryModel.measure(bench_of(stack), [way], cost).peak(way, ROWS, depth)
    freezer = Freezer(stack)
    freezer.apply(Decision(depth))
    measured = whole_step(bench_of(stack), way, ROWS)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_layers_at_rest_are_measured_as_they_are() -> None:
    model = bert()
    stack = BlockStack.find(model)
    cost = OptimizerCost(2.0, 0.0)
    full = MemoryModel.measure(bench_of(stack), [Way("slimfit")], cost)
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "encoder" in name]
    Freezer(stack).apply(Decision(0, frozenset(names)))
    held = nbytes_of(model.get_parameter(name) for name in names)
    rests = MemoryModel.measure(bench_of(stack), [Way("slimfit")], cost, resting=held)
    dropped = MemoryModel.measure(bench_of(stack), [Way("slimfit")], cost)
    assert dropped.peak(Way("slimfit"), ROWS) + 2 * held == rests.peak(Way("slimfit"), ROWS)
    assert rests.peak(Way("slimfit"), ROWS) < full.peak(Way("slimfit"), ROWS)


def test_accumulated_gradients_stand_beside_all_activations() -> None:
    model = MemoryModel.measure(bench_of(BlockStack.find(bert())), [Way()], OptimizerCost(2.0, 0.0))
    assert model.peak(Way(), ROWS, accumulates=True) > model.peak(Way(), ROWS)


@pytest.mark.parametrize("depth", [0, 3])
def test_buckets_stand_beside_the_gradients_of_what_trains(depth: int) -> None:
    """That they do: ``tests/distributed/test_contract.py``; in whole runs: ``tests/adapters/test_budget_ranks.py``."""
    stack, cost = BlockStack.find(bert()), OptimizerCost(2.0, 0.0)
    buckets = Buckets.of(stack.model)
    alone, ranks = (MemoryModel.measure(bench_of(stack), [Way()], cost, buckets=b) for b in (None, buckets))
    trains = sum(ranks.trains if depth == 0 else ranks.trains[depth + 1 :])
    assert ranks.peak(Way(), ROWS, depth) == alone.peak(Way(), ROWS, depth) + trains
    # Of one sample the activations are less than the buckets of all that is frozen later.
    assert ranks.peak(Way(), 1, 5) == ranks.weights + 2 * sum(ranks.trains[6:]) + buckets.first


@pytest.mark.parametrize(
    ("build", "state"),
    [
        (adamw, 2.0),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0),
    ],
    ids=["adamw", "sgd", "momentum"],
)
def test_what_an_optimizer_takes(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], state: float) -> None:
    weight = torch.randn(64, 64)
    before = weight.clone()
    assert optimizer_cost(build, weight).state == state
    assert torch.equal(weight, before)


def test_an_optimizer_with_temporaries_of_its_own() -> None:
    slow = optimizer_cost(lambda p: torch.optim.AdamW(p, foreach=True), torch.randn(64, 64))
    fast = optimizer_cost(adamw, torch.randn(64, 64))
    assert slow.step >= 1.0 > fast.step


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = bert().eval()
    gradient = torch.ones_like(model.classifier.weight)
    model.classifier.weight.grad = gradient
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    bench = bench_of(BlockStack.find(model))
    MemoryModel.measure(bench, WAYS, OptimizerCost(2.0, 0.0))
    bench.seconds(Way("safe"), 2)
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.classifier.weight.grad is gradient
    assert model.bert.pooler.dense.weight.grad is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_that_skips_blocks_at_random_is_refused() -> None:
    model = bert()

    class Dropped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden if torch.rand(()) < 0.5 else self.layer(hidden, *args, **kwargs)

    stack = BlockStack.find(model)
    for place, layer in enumerate(stack.blocks):
        model.bert.encoder.layer[place] = Dropped(layer)
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"ran \d of 6 blocks.*layerdrop = 0"):
        bench_of(stack).spans(Way(), 2)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in stack.blocks)
