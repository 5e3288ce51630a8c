"""``inspect_model``: everything is counted once, and time and memory go to the block that spends them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frostline import ConfigError, ModelError
from frostline.inspection import Inspection, Part, inspect_model
from frostline.trace import made_up_call
from tests.architectures import ARCHITECTURES, Architecture
from tests.conftest import Stopwatch
from tests.tiny import BLOCKS, WIDTH, NoStack, PlainNetwork

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MEASURED = [a for a in ARCHITECTURES if a.path is None]
SLOW = 0.5  # seconds


def build(name: str) -> nn.Module:
    return BY_NAME[name].build()


def inspect(model: nn.Module, **options: Any) -> Inspection:
    return inspect_model(model, **{"batch": 2, "length": 8, "repeats": 1, **options})


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("architecture", MEASURED, ids=lambda a: a.name)
def test_every_parameter_is_counted_once_and_every_part_is_measured(architecture: Architecture) -> None:
    model = architecture.build()
    found = inspect(model)
    names = ["stem", *(f"block {i}" for i in range(architecture.blocks)), "head"]
    assert [part.name for part in found.parts] == names
    assert sum(part.parameters for part in found.parts) == sum(p.numel() for p in model.parameters())
    assert sum(part.bytes for part in found.parts) == 4 * sum(p.numel() for p in model.parameters())
    for part in found.parts:
        assert part.forward_seconds is not None
        assert part.backward_seconds is not None
        assert min(part.forward_seconds, part.backward_seconds) >= 0
        assert (part.boundary_bytes_per_sample is None) == (part.name == "head")
    for block in found.parts[1:-1]:
        assert block.forward_seconds
        assert block.saved_bytes
    bounds = found.bounds()
    assert bounds is not None
    assert bounds[0] == 1.0
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("name", ["bert", "wav2vec2", "resnet", "lora-bert"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name).eval()
    model(**BY_NAME[name].inputs(2))  # a transformers model adds hooks of its own in its first forward pass
    kept = next(p for p in model.parameters() if p.requires_grad)
    kept.grad = torch.ones_like(kept)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = count_hooks(model)
    random = torch.get_rng_state()
    inspect(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for (trains, gradient), parameter in zip(flags, model.parameters(), strict=True):
        assert parameter.requires_grad == trains
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert not any(module.training for module in model.modules())
    assert count_hooks(model) == hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_forward_time_goes_to_the_block_that_spends_it(stopwatch: Stopwatch) -> None:
    model = build("bert")
    layer = model.get_submodule("bert.encoder.layer.2.attention.output.dense")
    handle = layer.register_forward_hook(lambda *_: stopwatch.sleep(SLOW))
    found = inspect(model)
    handle.remove()
    assert [part.forward_seconds for part in found.parts] == [0, 0, 0, SLOW, 0, 0]
    assert not any(part.backward_seconds for part in found.parts)


@pytest.mark.parametrize("part", ["attention.self.query", "output.dense"])
def test_backward_time_goes_to_the_block_that_spends_it(part: str, stopwatch: Stopwatch) -> None:
    """A weight's gradient is of its block, whether that block's backward pass begins or ends with it."""
    model = build("bert")
    weight = model.get_submodule(f"bert.encoder.layer.1.{part}").weight
    assert isinstance(weight, nn.Parameter)
    handle = weight.register_post_accumulate_grad_hook(lambda _: stopwatch.sleep(SLOW))
    found = inspect(model)
    handle.remove()
    assert [part.backward_seconds for part in found.parts] == [0, 0, SLOW, 0, 0, 0]
    assert not any(part.forward_seconds for part in found.parts)


@pytest.mark.parametrize("name", ["bert", "gpt2", "convnext"])
def test_saved_bytes_add_up_to_what_autograd_saves(name: str) -> None:
    model = build(name)
    found = inspect(model)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    runner, call = made_up_call(model, [], 2, 8)
    assert call is not None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = runner.train()(**call[1])
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert sum(part.saved_bytes or 0 for part in found.parts) == expected
    assert output is not None
    if name == "bert":
        assert len({part.saved_bytes for part in found.parts[1:-1]}) == 1


def test_a_record_is_the_hidden_width_times_the_element_size() -> None:
    per_token = 4 * WIDTH
    for part in inspect(build("bert")).parts[:-1]:
        assert (part.boundary_bytes_per_token, part.boundary_bytes_per_sample) == (per_token, 8 * per_token)
    half = inspect(build("bert").to(torch.bfloat16))
    assert half.parts[1].boundary_bytes_per_token == per_token // 2
    pictures = inspect(build("convnext"))
    assert pictures.length is None
    assert pictures.parts[1].boundary_bytes_per_token is None
    assert pictures.parts[1].boundary_bytes_per_sample


def test_tied_and_shared_tensors_are_named_where_they_freeze() -> None:
    tied = inspect(build("llama-lm"))
    assert tied.parts[0].freezes_with == ("lm_head.weight (tied)",)
    assert any("same tensor" in limit for limit in tied.limits)
    shared = inspect(build("mpnet"))
    assert "mpnet.encoder.relative_attention_bias" in shared.parts[0].path.split(", ")


def test_what_stands_outside_its_block_is_named() -> None:
    class Between(nn.Module):
        """A projection that stands after the list's second block and not in it."""

        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"image_size": 4, "num_channels": 1})()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
            self.between = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            hidden = self.between(self.blocks[1](self.blocks[0](pixel_values)))
            out: torch.Tensor = self.last(self.blocks[2](hidden))
            return out

    found = inspect(Between(), blocks="blocks")
    assert [part.freezes_with for part in found.parts] == [(), (), ("between",), (), ()]
    assert found.parts[2].parameters == 2 * 20


def test_the_bound_is_the_formula_where_blocks_are_equal() -> None:
    blocks = 6
    parts = [
        Part("stem", "", 0, 0, (), forward_seconds=0.0, backward_seconds=0.0),
        *(Part(f"block {i}", "", 0, 0, (), forward_seconds=1.0, backward_seconds=2.0) for i in range(blocks)),
        Part("head", "", 0, 0, (), forward_seconds=0.0, backward_seconds=0.0),
    ]
    bounds = Inspection("Model", "blocks", 1, 1, parts, []).bounds()
    assert bounds == pytest.approx([(3 * blocks - 2 * k) / (3 * blocks) for k in range(blocks)])


def test_a_plain_module_comes_without_measurements_and_says_so() -> None:
    found = inspect(PlainNetwork(), blocks="trunk.cells")
    assert found.blocks == BLOCKS
    assert found.bounds() is None
    assert all(part.parameters and part.forward_seconds is None for part in found.parts)
    assert any("nothing was measured" in limit for limit in found.limits)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="batch=0: must be at least 1"):
        inspect(build("bert"), batch=0)
    with pytest.raises(ConfigError, match="length=33: .* at most 32 tokens"):
        inspect(build("bert"), length=33)
    with pytest.raises(ModelError, match="no list of two or more blocks"):
        inspect(NoStack())
