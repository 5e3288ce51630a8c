"""Law 1 under ``torch.compile``: at most one new graph per change of depth."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.architectures import ARCHITECTURES
from tests.laws.loops import Loop, Run, moved, parameters, prefix_buffers

BY_NAME = {a.name: a for a in ARCHITECTURES}


@pytest.mark.parametrize(
    ("name", "in_place"),
    [
        pytest.param("bert", False, id="bert-torch.compile"),
        pytest.param("bert", True, id="bert-model.compile", marks=pytest.mark.slow),
        pytest.param("resnet", False, id="resnet-torch.compile", marks=pytest.mark.slow),
        pytest.param("resnet", True, id="resnet-model.compile", marks=pytest.mark.slow),
    ],
)
def test_one_new_graph_per_depth(name: str, in_place: bool) -> None:
    """Depths 0, 1, 2 and back to 0: each new depth costs one graph, one seen before costs none."""
    torch._dynamo.reset()
    architecture, counter = BY_NAME[name], CompileCounterWithBackend("aot_eager")
    run = Run(architecture, "adamw")
    if in_place:
        run.model.compile(backend=counter)
        compiled = run.model
    else:
        compiled = torch.compile(run.model, backend=counter)
    loop = Loop()
    graphs = []
    for depth in (0, 1, 2, 0):
        run.freeze(depth)
        before, buffers = parameters(run.model), prefix_buffers(run.stack, depth)
        for step in range(3):
            loop.step(compiled, run.optimizer, [architecture.inputs(seed=step)])
        graphs.append(counter.frame_count)
        changed, prefix = moved(before, parameters(run.model)), set(run.stack.prefix_parameters(depth))
        assert not changed & prefix
        assert not moved(buffers, prefix_buffers(run.stack, depth))
        assert changed & set(run.stack.parameters_of(depth))
        assert all(p.grad is None for p in run.stack.prefix_parameters(depth).values())
    assert graphs[0] >= 1, "nothing was compiled"
    new = [after - before for before, after in pairwise(graphs)]
    assert max(new[:2]) <= 1, f"new graphs at depths 1, 2, 0: {new}"
    assert new[2] == 0, f"going back to depth 0 compiled again: {new}"
