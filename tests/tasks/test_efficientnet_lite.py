"""The network of efficientnet-lite0: its padding by hand, its parts, and that it is saved and loaded as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from frostline import BlockStack
from frostline.tasks.efficientnet_lite import (
    EfficientNetLiteBlock,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    EfficientNetLiteModel,
    _SameConv2d,
    same_padding,
)


def build(classes: int = 3, image_size: int = 224) -> EfficientNetLiteForImageClassification:
    torch.manual_seed(0)
    return EfficientNetLiteForImageClassification(EfficientNetLiteConfig(image_size=image_size, num_labels=classes))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        # Stride 1 keeps the size: kernel - 1 in all.
        (7, 3, 1, (1, 1)),
        (7, 5, 1, (2, 2)),
        (7, 1, 1, (0, 0)),
        # Stride 2 over an even size: the last window starts at size - 2, so kernel - 2 in all, the odd one after.
        (224, 3, 2, (0, 1)),
        (8, 5, 2, (1, 2)),
        # Over an odd one it starts at the last pixel: kernel - 1.
        (7, 3, 2, (1, 1)),
        (9, 5, 2, (2, 2)),
    ],
)
def test_padding_by_hand(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride) == expected


def test_a_convolution_by_hand() -> None:
    """Ones over 0..15 in 4 x 4, stride 2: windows start at 0 and 2, and see nothing beyond the right and lower edge."""
    convolution = _SameConv2d(1, 1, kernel=3, stride=2)
    torch.nn.init.ones_(convolution.weight)
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert convolution(image).tolist() == [[[[45.0, 39.0], [66.0, 50.0]]]]
    # Two rows by five columns: one row of windows below an even height, padded differently from the odd width.
    wide = torch.arange(10.0).reshape(1, 1, 2, 5)
    assert convolution(wide).tolist() == [[[[0 + 1 + 5 + 6, 1 + 2 + 3 + 6 + 7 + 8, 3 + 4 + 8 + 9]]]]


@pytest.mark.parametrize("size", [32, 64, 50, 224])
def test_even_padding_by_the_convolution_is_the_same_as_padding_first(size: int) -> None:
    torch.manual_seed(0)
    convolution = _SameConv2d(2, 2, kernel=5, groups=2)
    image = torch.randn(1, 2, size, size)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    expected = torch.nn.functional.conv2d(padded, convolution.weight, groups=2)
    assert torch.allclose(convolution(image), expected, atol=1e-6)


def test_the_published_size_and_sixteen_blocks() -> None:
    model = build(classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    stack = BlockStack.find(model)
    assert (stack.path, len(stack), stack.traced) == ("efficientnet_lite.blocks", 16, True)
    assert stack.limits == []
    assert not stack.noisy_parents, "what is random stands in the blocks, or after them"
    assert stack.owner("efficientnet_lite.stem.conv.weight") == "stem"
    assert stack.owner("efficientnet_lite.top.norm.weight") == "head"
    assert stack.owner("classifier.weight") == "head"
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize(("size", "last"), [(64, 2), (224, 7), (50, 2)])
def test_five_times_half_the_size_rounded_up(size: int, last: int) -> None:
    model = build().efficientnet_lite.eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, size, size))
    assert out.last_hidden_state.shape == (1, 1280, last, last)
    assert torch.allclose(out.pooler_output, out.last_hidden_state.mean((2, 3)))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = build(image_size=32).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EfficientNetLiteConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, EfficientNetLiteForImageClassification)
    assert loaded.config.image_size == 32
    assert loaded.config.drop_connect_rate == 0.2
    image = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    # Where weights lie in memory decides between kernels that round differently.
    torch.testing.assert_close(loaded(image).logits, model(image).logits, rtol=1e-4, atol=0.0)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, EfficientNetLiteModel)
    assert torch.equal(backbone.stem.conv.weight, model.efficientnet_lite.stem.conv.weight)


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = build().eval()
    image, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])
    out = model(image, labels=labels)
    assert torch.equal(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_connect_leaves_whole_samples_out_in_training_only() -> None:
    torch.manual_seed(0)
    block = EfficientNetLiteBlock(8, 8, kernel=3, stride=1, expansion=6, drop_rate=0.5)
    x = torch.randn(64, 8, 4, 4)
    block.train()
    branch = block(x) - x
    left_out = branch.flatten(1).abs().amax(1) == 0
    assert 10 < int(left_out.sum()) < 54
    block.eval()
    assert torch.equal(block(x), block(x))
    assert not ((block(x) - x).flatten(1).abs().amax(1) == 0).any()
    rates = [b.drop_rate for b in build().efficientnet_lite.blocks]
    assert rates[0] == 0.0
    assert rates[15] == pytest.approx(0.2 * 15 / 16)
