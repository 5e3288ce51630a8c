"""Image classification: from labelled images and a model's name to what a Trainer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from frostline.errors import ConfigError, ModelError
from frostline.tasks._quiet import quiet_transformers
from frostline.tasks.classification import Prepared, compute_metrics, first_line, load_classifier, model_path
from frostline.tasks.data import ImageSpec, read_splits

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from transformers import BaseImageProcessor, BatchFeature, PreTrainedModel

__all__ = ["build_model", "prepare"]


def prepare(spec: ImageSpec, model: str, image_size: int | None = None) -> Prepared:
    """Read the data, to be shown to ``model`` (an asset, a local folder or a hub id) as squares of ``image_size``.

    ``image_size`` is in pixels; None: what the model's own preprocessor says. An image is squeezed to the square, never
    cropped or augmented, so that a sample is the same in every epoch. Rows hold ``pixel_values``, uint8 of shape
    (3, size, size); the collator normalises a batch as the model's preprocessor does, to float32.

    Images are kept as they are stored and decoded when a row is looked at: 70,000 of Fashion-MNIST take 30 MB so, but
    2 GB as squares of 98 pixels and 8 GB normalised, while decoding and squeezing one takes 0.15 ms where a training
    step takes tens of milliseconds for it. Workers of the data loader share that work (``dataloader_num_workers``).

    Raises :class:`DataError` as :func:`read_splits` does, :class:`ModelError` where the model has no image
    preprocessor, and :class:`ConfigError` for an ``image_size`` that does not fit the model's patches, or that neither
    the user nor the preprocessor says.
    """
    import frostline.tasks.efficientnet_lite  # noqa: F401 (registers its classes)

    processor, size = _load_processor(model, image_size)
    _check_patches(model, size)
    collator = _normalisation(processor, model, size)
    squares = _Squares(size, _resample(processor))
    splits = read_splits(spec)
    shown: dict[str, Dataset] = {}
    for split, rows in splits.items():
        # Under the names that models have for them, so that the Trainer drops no column that the transform needs.
        renamed = rows.rename_columns({"image": "pixel_values", "label": "labels"})
        shown[split] = renamed.with_transform(squares, columns=["pixel_values"], output_all_columns=True)
    return Prepared(
        train=shown["train"],
        validation=shown["validation"],
        test=shown.get("test"),
        processor=processor,
        collator=collator,
        labels=list(splits["train"].features["label"].names),
        compute_metrics=compute_metrics,
    )


def build_model(prepared: Prepared, model_name_or_path: str, seed: int) -> PreTrainedModel:
    """Load a model (an asset, a local folder or a hub id) in fp32 with a classification head for the labels.

    A head for other classes (nearly every checkpoint has one for ImageNet's) is drawn anew from ``seed``; the global
    random state is left as it was.

    Raises :class:`ModelError` where nothing can be loaded, :class:`ConfigError` where the model does not take images
    of the size they are prepared in.
    """
    from transformers import AutoModelForImageClassification

    import frostline.tasks.efficientnet_lite  # noqa: F401 (registers its classes)

    model = load_classifier(
        AutoModelForImageClassification, prepared.labels, model_name_or_path, seed, replace_head=True
    )
    batch = prepared.collator([prepared.train[0]])
    try:
        # Whether a size fits is known to a model's code alone: one sample shows it before anything is written.
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            model.eval()(**batch)
    except (ValueError, RuntimeError) as error:
        size = batch["pixel_values"].shape[-1]
        raise ConfigError(f"image_size={size}: {model_name_or_path!r} cannot take it: {first_line(error)}") from error
    return model


@dataclass(frozen=True)
class _Squares:
    """A transform of images, each to an RGB square of ``size`` pixels: uint8 of shape (3, size, size)."""

    size: int
    resample: int

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [self._square(image) for image in rows["pixel_values"]]}

    def _square(self, image: Image) -> torch.Tensor:
        from PIL import Image as pillow

        if image.has_transparency_data:
            # On white, as the preprocessors of transformers put it; what lies under transparency may be anything.
            image = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
        resized = image.convert("RGB").resize((self.size, self.size), pillow.Resampling(self.resample))
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class _Normalise:
    """A collator: ``pixel_values`` float32 of shape (rows, 3, size, size), ``labels`` int64 of shape (rows,).

    ``scale`` and ``shift`` have shape (3, 1, 1), one value for each channel.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        from transformers import BatchFeature

        pixels = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return BatchFeature({"pixel_values": pixels * self.scale + self.shift, "labels": labels})


def _load_processor(model: str, image_size: int | None) -> tuple[BaseImageProcessor, int]:
    """The model's image preprocessor, set to squares, and their size.

    It is saved beside the trained model, so that a pipeline shows the model what training has shown it.
    """
    from transformers import AutoImageProcessor

    path = model_path(model)
    try:
        with quiet_transformers():
            # Pillow does the work here, too; nothing that torchvision would bring is needed.
            processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"cannot load the image preprocessor of {model!r}: {first_line(error)}") from error
    size = image_size or _own_size(processor, model)
    square: dict[str, Any] = {"size": {"height": size, "width": size}}
    if hasattr(processor, "crop_pct"):
        # ConvNeXt's preprocessor, which ResNet and RegNet have as well, knows one edge and the share it then crops.
        square = {"size": {"shortest_edge": size}, "crop_pct": 1.0}
    settings = {"do_resize": True, "do_center_crop": False, "do_convert_rgb": True, **square}
    return type(processor).from_dict(processor.to_dict() | settings), size


def _own_size(processor: BaseImageProcessor, model: str) -> int:
    """The edge of the square that a preprocessor makes, in pixels: what it crops to, or else what it resizes to."""
    settings = processor.to_dict()
    wanted = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    edges = set(dict(wanted or {}).values())
    if len(edges) != 1:
        said = f"says {dict(wanted)}" if wanted else "says none"
        raise ConfigError(f"image_size=null: the preprocessor of {model!r} {said}, no square; give the size in pixels")
    return int(edges.pop())


def _check_patches(model: str, size: int) -> None:
    """Some models leave pixels beyond the last whole patch out without a word."""
    from transformers import AutoConfig

    try:
        patch = getattr(AutoConfig.from_pretrained(model_path(model)), "patch_size", None)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the configuration of {model!r}: {first_line(error)}") from error
    if isinstance(patch, int) and size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ConfigError(
            f"image_size={size}: {model!r} sees patches of {patch} pixels, so it must be a multiple of {patch}, "
            f"{near} for instance"
        )


def _normalisation(processor: BaseImageProcessor, model: str, size: int) -> _Normalise:
    """What a preprocessor makes of black and of white: it is linear in between, whatever its settings are called."""
    from PIL import Image as pillow

    squares = [pillow.new("RGB", (size, size), colour) for colour in ("black", "white")]
    try:
        black, white = processor(squares, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the image preprocessor of {model!r} makes no squares: {first_line(error)}") from error
    if black.shape != (3, size, size):
        raise ModelError(f"the image preprocessor of {model!r} makes {tuple(black.shape)} of a {size} x {size} image")
    shift, scale = black[:, :1, :1], (white - black)[:, :1, :1] / 255
    return _Normalise(scale.clone(), shift.clone())


def _resample(processor: BaseImageProcessor) -> int:
    """How the preprocessor fills in between pixels, as Pillow counts the ways; it leaves 2, bilinear, unsaid."""
    resample = getattr(processor, "resample", None)
    return 2 if resample is None else int(resample)
