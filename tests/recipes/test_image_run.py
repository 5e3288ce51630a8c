"""Whole runs on images: digits, a tiny transformer and the convolutional network, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from frostline.errors import FrostlineError
from frostline.recipes.runner import RunResult, prepare, run
from frostline.recipes.schema import Recipe
from frostline.tasks import assets
from frostline.tasks.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from tests.recipes.test_runner import weights
from tests.tasks.pictures import VIT_PREPROCESSOR, write_vit


@pytest.fixture
def workbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``model``, and digits in a cache of the test's own."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    assets.fetch("digits", progress=False)
    write_vit(tmp_path / "model")
    return tmp_path


def content(root: Path, **changes: Any) -> dict[str, Any]:
    """2 epochs of 12 steps; the line stands above two of four blocks, and what comes out of them is kept."""
    return {
        "task": "image-classification",
        "model": str(root / "model"),
        "data": {"source": "digits", "train_limit": 96, "validation_limit": 24, "test_limit": 24},
        "freeze": {"policy": "static", "depth": 2},
        "cache": {"mode": "memory"},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        "output_dir": str(root / "run"),
    } | changes


def start(root: Path, **changes: Any) -> RunResult:
    return run(Recipe.model_validate(content(root, **changes)))


def test_a_run_on_images_end_to_end(workbench: Path) -> None:
    result = start(workbench, baseline="full")
    summary = result.summary
    assert (summary["steps"], summary["samples"], summary["blocks"], summary["final_depth"]) == (24, 192, 4, 2)
    assert summary["cache"]["hits"] == 96, "each image is the same in the second epoch"
    assert {"accuracy", "macro_f1", "loss"} == set(summary["metrics"]) == set(summary["test"])
    assert result.baseline is not None
    assert result.baseline["cache"] is None

    folder = result.directory / "model"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert set(model.config.label2id) == {str(n) for n in range(10)}
    # Whoever loads the folder shows the model what training has shown it.
    recipe = Recipe.model_validate(content(workbench))
    data = prepare(recipe)
    assert data.test is not None
    batch = data.collator([data.test[0]])
    image = data.test.with_format(None)[0]["pixel_values"]
    saved = AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = saved(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(theirs, batch["pixel_values"], atol=1e-5)
    with torch.no_grad():
        best = model.config.id2label[int(model(**batch).logits.argmax())]
    assert pipeline("image-classification", model=str(folder))(image)[0]["label"] == best


def test_a_run_on_images_repeats_bit_for_bit_whatever_loads_them(workbench: Path) -> None:
    training = content(workbench)["training"]
    first = start(workbench, output_dir=str(workbench / "first"))
    workers = start(
        workbench, output_dir=str(workbench / "workers"), training={**training, "dataloader_num_workers": 2}
    )
    assert weights(first.directory) == weights(workers.directory)


def test_the_convolutional_network_runs_as_any_other(workbench: Path) -> None:
    torch.manual_seed(0)
    folder = workbench / "lite"
    network = EfficientNetLiteModel(EfficientNetLiteConfig())
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            # As large as trained weights: BatchNorm of a frozen block does not make up for small ones.
            torch.nn.init.kaiming_normal_(module.weight)
    network.save_pretrained(folder)
    preprocessor = write_vit(workbench / "other", VIT_PREPROCESSOR) / "preprocessor_config.json"
    preprocessor.rename(folder / "preprocessor_config.json")
    result = start(
        workbench,
        model=str(folder),
        image_size=32,
        data={"source": "digits", "train_limit": 32, "validation_limit": 8, "test_limit": 8},
        freeze={"policy": "static", "depth": 6},
    )
    assert (result.summary["blocks"], result.summary["stack"]) == (16, "efficientnet_lite.blocks")
    assert result.summary["cache"]["hits"] == 32
    before = EfficientNetLiteModel.from_pretrained(folder).state_dict()
    after = AutoModelForImageClassification.from_pretrained(result.directory / "model").efficientnet_lite.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {n for n in before if n.startswith("stem.") or n.startswith(tuple(f"blocks.{i}." for i in range(6)))}
    assert frozen <= still, "BatchNorm's statistics too"
    assert not {name for name in still - frozen if name.endswith("weight")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "image_size=18: .* patches of 4 pixels, so it must be a multiple of 4, "),
        ({"image_size": 32}, "image_size=32: .* cannot take it"),
        ({"data": {"source": "trec"}}, "holds no image but a kind of text; choose: digits, fashion-mnist"),
        ({"model": "digits"}, "asset 'digits' is no model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workbench: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrostlineError, match=message) as caught:
        start(workbench, output_dir=str(workbench / "some" / "where"), **changes)
    assert "\n" not in str(caught.value)
    assert not (workbench / "some").exists()
