"""Compression inside of a run: what the engine makes of it, and what it says where nothing is compressed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from frostline import Frostline
from frostline.errors import ModelError
from tests.architectures import ARCHITECTURES
from tests.laws.loops import OPTIMIZERS
from tests.memory.steps import everything_packs

BERT = next(a for a in ARCHITECTURES if a.name == "bert")
RUN = {"steps_per_epoch": 8, "epochs": 1}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with everything_packs():
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class HeadFirst(nn.Module):
    """Its inputs cannot be made up, and its head is registered first: taken for the stem until a batch shows better."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(32, 4)
        self.embed = nn.Linear(16, 32)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embed(frames)
        for block in self.layers:
            x = block(x)
        return self.readout(x)


def top_hooks() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def step(frost: Frostline, model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = 8) -> None:
    model(torch.randn(rows, 16)).square().mean().backward()
    frost.before_step()
    optimizer.step()
    optimizer.zero_grad()
    frost.after_step()


def test_a_refused_run_leaves_the_model_as_it_was() -> None:
    model = BERT.build()
    with pytest.raises(ModelError, match="compiled"):
        Frostline(torch.compile(model), None, policy="static", depth=2, memory="slimfit", **RUN)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_first_pass_is_compressed_to_its_end() -> None:
    """The engine looks at what the model does with its first batch, in the middle of the first training pass."""
    model = HeadFirst()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    frost = Frostline(model, optimizer, policy="static", depth=0, memory="slimfit", **RUN)  # type: ignore[arg-type]
    assert not frost.stack.traced
    kept, packs = [], []
    model.readout.register_forward_hook(lambda *_: packs.append(top_hooks() is not None))
    for _ in range(2):
        assert frost._compressor is not None
        frost._compressor.kept = 0
        step(frost, model, optimizer)
        kept.append(frost._compressor.kept)
    assert frost.stack.traced
    assert packs
    assert all(packs)  # the look's passes and the training passes, each up to its head
    assert 0.9 * kept[1] < kept[0] <= kept[1]  # what the look has packed, the inputs, is not packed twice


def test_a_head_that_was_taken_for_the_stem_does_not_rest() -> None:
    model = HeadFirst()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    frost = Frostline(model, optimizer, policy="interlayer", share=0.75, **RUN)  # type: ignore[arg-type]
    for _ in range(8):
        step(frost, model, optimizer)
        assert "readout.weight" not in frost.freezer.decision.resting
    assert frost.plan.head_paths == ("readout",)


@pytest.mark.parametrize("policy", ["none", "static"])
def test_a_loop_may_call_an_inner_module(policy: str) -> None:
    """Lightning calls training_step, which calls the model inside of the module that Frostline is given."""
    outer = nn.ModuleDict({"inner": BERT.build()})
    options = {"depth": 0} if policy == "static" else {}
    frost = Frostline(outer, None, policy=policy, memory="safe", **options, **RUN)  # type: ignore[arg-type]
    outer["inner"](**BERT.inputs()).loss.backward()
    frost.after_step()
    assert frost.summary()["memory"]["kept"] > 0
    assert not frost.summary()["limits"]


def test_a_model_that_no_pass_goes_through_is_said_to_be_left_alone() -> None:
    model = BERT.build()
    frost = Frostline(nn.Linear(2, 2), None, policy="none", memory="safe", **RUN)  # type: ignore[arg-type]
    model(**BERT.inputs()).loss.backward()
    frost.after_step()
    assert any("nothing is compressed" in limit for limit in frost.summary()["limits"])


def test_the_most_that_was_kept_is_part_of_the_state() -> None:
    def run(sizes: list[int], state: dict[str, object] | None = None) -> Frostline:
        model = HeadFirst()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        frost = Frostline(model, optimizer, policy="none", memory="safe", **RUN)  # type: ignore[arg-type]
        if state is not None:
            frost.load_state_dict(state)
        for rows in sizes:
            step(frost, model, optimizer, rows)
        return frost

    whole = run([16, 4]).summary()["memory"]
    assert run([4], run([16]).state_dict()).summary()["memory"] == whole
