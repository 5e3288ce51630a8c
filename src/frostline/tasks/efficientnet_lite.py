"""EfficientNet-Lite0: the convolutional network of the asset ``efficientnet-lite0``.

Architecture: Tan and Le 2019 (arXiv 1905.11946), Table 1, as the Lite variant changes it (github.com/tensorflow/tpu,
models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6 for swish, stem and top at fixed width. The
weights were trained with TensorFlow, so padding is TensorFlow's and BatchNorm has its epsilon and momentum.

transformers has EfficientNet with squeeze-and-excitation only. Importing this module registers the classes below with
``AutoConfig``, ``AutoModel`` and ``AutoModelForImageClassification``; whoever loads a model that was trained from this
asset imports it first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteForImageClassification",
    "EfficientNetLiteModel",
    "same_padding",
]

# Blocks, kernel, stride of the first block, expansion, channels out.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _TOP = 32, 1280
# TensorFlow's momentum 0.99 is the share that is kept, torch's the share that is new.
_EPSILON, _MOMENTUM = 1e-3, 0.01


class EfficientNetLiteConfig(PreTrainedConfig):
    """What may differ between two models, as they were pre-trained.

    ``image_size`` is in pixels, and any other works as well; ``dropout_rate`` is that before the classifier;
    ``drop_connect_rate`` is the rate at which a residual branch is left out in training, linear in depth up to it.
    """

    model_type = "efficientnet-lite"

    def __init__(
        self, image_size: int = 224, dropout_rate: float = 0.2, drop_connect_rate: float = 0.2, **kwargs: Any
    ) -> None:
        self.image_size = image_size
        self.dropout_rate = dropout_rate
        self.drop_connect_rate = drop_connect_rate
        super().__init__(**kwargs)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels that TensorFlow's "SAME" adds before and after ``size`` pixels.

    An odd one goes after; torch's own padding is the same on both sides and would shift what every later layer sees.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class _SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": ``[rows, channels, ceil(h / stride), ...]``."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        (top, bottom), (left, right) = (same_padding(size, kernel, stride) for size in x.shape[-2:])
        if (top, left) != (bottom, right):
            x = functional.pad(x, (left, right, top, bottom))
            top = left = 0
        # Even padding is left to the convolution: padding first would copy the whole map.
        return functional.conv2d(x, self.weight, None, self.stride, (top, left), 1, self.groups)


class _ConvNorm(nn.Module):
    """Convolution and BatchNorm."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = _SameConv2d(inside, outside, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(outside, eps=_EPSILON, momentum=_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x))
        return normed


class EfficientNetLiteBlock(nn.Module):
    """An inverted residual (MBConv) without squeeze-and-excitation: expand, convolve depthwise, project.

    ``drop_rate`` is the share of samples whose residual branch is left out in training (drop connect).
    """

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int, drop_rate: float) -> None:
        super().__init__()
        inner = inside * expansion
        self.expand = _ConvNorm(inside, inner) if expansion != 1 else None
        self.depthwise = _ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = _ConvNorm(inner, outside)
        self.activation = nn.ReLU6()
        self.residual = stride == 1 and inside == outside
        self.drop_rate = drop_rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[rows, inside, h, w]`` to ``[rows, outside, ceil(h / stride), ceil(w / stride)]``."""
        x: Tensor = hidden_states
        if self.expand is not None:
            x = self.activation(self.expand(x))
        x = self.project(self.activation(self.depthwise(x)))
        if not self.residual:
            return x
        if self.training and self.drop_rate > 0:
            kept = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device) >= self.drop_rate
            x = x * kept / (1 - self.drop_rate)
        return hidden_states + x


class _EfficientNetLitePreTrained(PreTrainedModel):
    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"


class EfficientNetLiteModel(_EfficientNetLitePreTrained):
    """Stem, 16 blocks in :attr:`blocks`, and the 1 x 1 convolution above them."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        count = sum(stage[0] for stage in _STAGES)
        self.stem = _ConvNorm(3, _STEM, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        channels = _STEM
        for repeats, kernel, stride, expansion, outside in _STAGES:
            for repeat in range(repeats):
                rate = config.drop_connect_rate * len(self.blocks) / count
                first = stride if repeat == 0 else 1
                self.blocks.append(EfficientNetLiteBlock(channels, outside, kernel, first, expansion, rate))
                channels = outside
        self.top = _ConvNorm(channels, _TOP)
        self.activation = nn.ReLU6()
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPoolingAndNoAttention:
        """``[rows, 3, h, w]`` to the last map ``[rows, 1280, h / 32, w / 32]`` and its mean ``[rows, 1280]``."""
        hidden_states = self.activation(self.stem(pixel_values))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = self.activation(self.top(hidden_states))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=(-2, -1))
        )


class EfficientNetLiteForImageClassification(_EfficientNetLitePreTrained):
    """The network with dropout and a linear classifier."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.efficientnet_lite = EfficientNetLiteModel(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(_TOP, config.num_labels or 0)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutputWithNoAttention:
        """``pixel_values`` is ``[rows, 3, h, w]``, ``labels`` class ids ``[rows]``; logits are ``[rows, classes]``."""
        pooled = self.efficientnet_lite(pixel_values).pooler_output
        logits = self.classifier(self.dropout(pooled))
        loss: Any = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)
