"""From labelled images and a tiny real model to batches and a seeded head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from frostline.errors import ConfigError, ModelError
from frostline.tasks.classification import Prepared
from frostline.tasks.data import ImageSpec
from frostline.tasks.image_classification import build_model, prepare
from tests.tasks.pictures import VIT_PREPROCESSOR, picture, write_folder, write_vit


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_vit(tmp_path_factory.mktemp("tiny-vit")))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ImageSpec:
    folder = write_folder(tmp_path_factory.mktemp("pets"), {"train": 10, "val": 2, "test": 2})
    return ImageSpec(source=str(folder))


@pytest.fixture
def prepared(spec: ImageSpec, model_path: str) -> Prepared:
    return prepare(spec, model_path)


def first_batch(prepared: Prepared) -> torch.Tensor:
    pixels: torch.Tensor = prepared.collator([prepared.train[0]])["pixel_values"]
    return pixels


def test_rows_are_squares_of_bytes_and_batches_are_normalised(prepared: Prepared) -> None:
    assert (len(prepared.train), len(prepared.validation)) == (20, 4)
    assert prepared.labels == ["cat", "dog"]
    assert prepared.train.column_names == ["pixel_values", "labels"]
    row = prepared.train[12]
    assert row["labels"] == 1
    assert (row["pixel_values"].dtype, row["pixel_values"].shape) == (torch.uint8, (3, 16, 16))
    resized = np.asarray(picture(102).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(row["pixel_values"].permute(1, 2, 0).numpy(), resized)

    batch = prepared.collator([row, prepared.train[0]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["pixel_values"].dtype == torch.float32
    mean, std = (np.array(VIT_PREPROCESSOR[key], np.float32) for key in ("image_mean", "image_std"))
    by_hand = ((resized / 255 - mean) / std).transpose(2, 0, 1)
    assert np.allclose(batch["pixel_values"][0].numpy(), by_hand, atol=1e-5)


PREPROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": VIT_PREPROCESSOR,
    "Bit, which crops": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 16, "width": 16},
        "resample": 3,
    },
    "ConvNext, which knows one edge": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}},
    "EfficientNet, which normalises twice": {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 16, "width": 16},
    },
}


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("size", [None, 24])
def test_training_shows_the_model_what_its_saved_preprocessor_does(
    tmp_path: Path, spec: ImageSpec, name: str, size: int | None
) -> None:
    prepared = prepare(spec, str(write_vit(tmp_path / "vit", PREPROCESSORS[name])), size)
    pixels = first_batch(prepared)
    assert pixels.shape == (1, 3, size or 16, size or 16)
    prepared.processor.save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    theirs = saved(picture(0), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, theirs, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P"])
def test_images_of_any_kind_become_rgb(tmp_path: Path, model_path: str, mode: str) -> None:
    folder = write_folder(tmp_path / "pets", {"train": 3})
    image = picture(7, mode="RGB").convert("P") if mode == "P" else picture(7, mode=mode)
    image.save(folder / "train" / "cat" / "000.png")
    prepared = prepare(ImageSpec(source=str(folder), validation_fraction=0.2), model_path)
    rows = [prepared.train[n] for n in range(len(prepared.train))] + [prepared.validation[0]]
    processor: Any = prepared.processor
    expected = processor(image, return_tensors="pt")["pixel_values"]
    close = [torch.allclose(prepared.collator([row])["pixel_values"], expected, atol=0.05) for row in rows]
    assert sum(close) == 1


def test_preparation_is_deterministic_and_leaves_no_files(spec: ImageSpec, model_path: str, prepared: Prepared) -> None:
    again = prepare(spec, model_path)
    for number in range(len(prepared.train)):
        first, second = prepared.train[number], again.train[number]
        assert first["labels"] == second["labels"]
        assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.equal(prepared.train[0]["pixel_values"], prepared.train[0]["pixel_values"])
    assert prepared.train.cache_files == []


def test_no_bar_and_no_report_is_shown(
    spec: ImageSpec, model_path: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    build_model(prepare(spec, model_path), model_path, seed=0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert caplog.records == []


def test_the_head_follows_the_seed_and_the_backbone_the_checkpoint(prepared: Prepared, model_path: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_model(prepared, model_path, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is its own"
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    for name, value in first.vit.state_dict().items():
        assert torch.equal(value, other.vit.state_dict()[name]), name
    assert first.config.id2label == {0: "cat", 1: "dog"}
    assert first(**prepared.collator([prepared.train[0]])).logits.shape == (1, 2)


def test_a_head_for_other_classes_is_replaced(tmp_path: Path, prepared: Prepared) -> None:
    """As ImageNet's, which nearly every checkpoint has."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    published = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=1000, **size))
    published.save_pretrained(tmp_path)
    model = build_model(prepared, str(tmp_path), seed=0)
    assert model.classifier.weight.shape == (2, 16)
    weights = published.vit.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.vit.state_dict().items())
    again = build_model(prepared, str(tmp_path), seed=0)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_saved_model_keeps_its_head(tmp_path: Path, prepared: Prepared, model_path: str) -> None:
    model = build_model(prepared, model_path, seed=3)
    model.save_pretrained(tmp_path)
    assert torch.equal(build_model(prepared, str(tmp_path), seed=9).classifier.weight, model.classifier.weight)


def test_a_size_that_does_not_fit_the_patches_names_one_that_does(tmp_path: Path, spec: ImageSpec) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(image_size=42, patch_size=14, **size)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS["Bit, which crops"]))
    with pytest.raises(ConfigError, match=r"image_size=100: .* patches of 14 pixels, .* multiple of 14, 98 for"):
        prepare(spec, str(tmp_path), 100)
    with pytest.raises(ConfigError, match=r"image_size=3: .* 14 for instance"):
        prepare(spec, str(tmp_path), 3)
    prepared = prepare(spec, str(tmp_path), 28)
    assert build_model(prepared, str(tmp_path), seed=0)(**prepared.collator([prepared.train[0]])).logits.shape == (1, 2)


def test_a_size_that_only_the_model_refuses_is_one_line(spec: ImageSpec, model_path: str) -> None:
    prepared = prepare(spec, model_path, 32)
    with pytest.raises(ConfigError, match=r"image_size=32: .* cannot take it: .*32.*16") as caught:
        build_model(prepared, model_path, seed=0)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_had(tmp_path: Path, spec: ImageSpec, prepared: Prepared) -> None:
    with pytest.raises(ModelError, match="is no Hugging Face model folder: it has no config.json"):
        prepare(spec, str(tmp_path))
    with pytest.raises(ModelError, match="asset 'digits' is no model; the models are: .*dinov2-small"):
        build_model(prepared, "digits", seed=0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="cannot load the image preprocessor"):
        prepare(spec, str(tmp_path))
    oblong = VIT_PREPROCESSOR | {"size": {"height": 16, "width": 32}}
    with pytest.raises(ConfigError, match="image_size=null: the preprocessor of .* no square; give the size in pixels"):
        prepare(spec, str(write_vit(tmp_path / "vit", oblong)))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size", "blocks"), [("dinov2-small", 98, 12), ("efficientnet-lite0", 64, 16)])
def test_the_real_models_on_real_articles(model: str, size: int, blocks: int, caplog: pytest.LogCaptureFixture) -> None:
    """Needs `frostline fetch dinov2-small efficientnet-lite0 fashion-mnist`; without them this fails, and says so."""
    spec = ImageSpec(source="fashion-mnist", train_limit=64, validation_limit=8, test_limit=8)
    prepared = prepare(spec, model, size)
    network = build_model(prepared, model, seed=0)
    assert caplog.records == []
    with torch.no_grad():
        loss = network(**prepared.collator([prepared.train[n] for n in range(32)])).loss
    # Near the loss of guessing among 10 classes, ln 10 = 2.30: a fresh head on a trained backbone.
    assert 1.8 < loss.item() < 3.2
