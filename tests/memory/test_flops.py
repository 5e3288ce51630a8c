"""The work of weights that rest is skipped: counted in floating-point operations, not in seconds."""

from __future__ import annotations

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frostline import BlockStack
from frostline.freezer import Freezer
from frostline.memory import Way
from frostline.policies.base import Decision
from tests.memory.test_model import batch, bench_of, bert

ROWS, LENGTH = 8, 32


def flops(model: nn.Module, way: Way) -> int:
    bench = bench_of(BlockStack.find(model))
    with bench.ready(way), FlopCounterMode(display=False) as counter:
        bench.forward(way, batch(ROWS)).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("level", ["off", "slimfit"])
def test_matrices_at_rest_cost_no_weight_gradient(level: str) -> None:
    model = bert()
    before = flops(model, Way(level))
    resting = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    Freezer(BlockStack.find(model)).apply(Decision(0, frozenset(f"{name}.weight" for name in resting)))
    after = flops(model, Way(level))
    # Two operations for each weight and token.
    skipped = sum(2 * ROWS * LENGTH * model.get_submodule(name).weight.numel() for name in resting)
    assert before - after == skipped
