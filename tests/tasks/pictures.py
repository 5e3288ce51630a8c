"""Small images of two classes on disk, and model folders to show them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

VIT_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


def picture(seed: int, size: tuple[int, int] = (20, 20), mode: str = "RGB") -> Image.Image:
    """An image of noise, ``size`` is width and height."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if bands == 1 else values)


def write_folder(folder: Path, rows: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """``<split>/<class>/<number>.png`` with as many images a class as ``rows`` says."""
    for split, count in rows.items():
        for place, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture(100 * place + number).save(folder / split / name / f"{number:03}.png")
    return folder


def write_vit(folder: Path, preprocessor: dict[str, Any] = VIT_PREPROCESSOR, blocks: int = 4) -> Path:
    """A tiny ViT of 16 x 16 pixels in 4 x 4 patches, without a head, and a preprocessor."""
    size = {"hidden_size": 16, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=4, **size), add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
