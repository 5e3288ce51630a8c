"""Reading, checking and cutting labelled images."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from frostline.errors import DataError
from frostline.tasks.data import ImageSpec, TextSpec, read_splits
from tests.tasks.pictures import picture, write_folder


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def error_of(spec: ImageSpec) -> str:
    with pytest.raises(DataError) as caught:
        read_splits(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_of_classes_gives_its_splits(tmp_path: Path) -> None:
    splits = read_splits(ImageSpec(source=str(write_folder(tmp_path / "pets", {"train": 5, "val": 2, "test": 3}))))

    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "validation": 4, "test": 6}
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert list(splits["test"]["label"]) == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(np.asarray(splits["test"][4]["image"]), np.asarray(picture(101)))


def test_classes_alone_are_train_and_validation_is_carved(tmp_path: Path) -> None:
    write_folder(tmp_path, {"pets": 20})
    splits = read_splits(ImageSpec(source=str(tmp_path / "pets"), train_limit=30, seed=1))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 30, "validation": 4}


def test_reading_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    splits = read_splits(ImageSpec(source=str(write_folder(tmp_path / "pets", {"train": 4}))))
    assert splits["train"].cache_files == []
    assert not (tmp_path / "cache").exists()
    assert list(scratch.iterdir()) == []


def test_parquet_as_datasets_writes_it_keeps_its_classes(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    for split, count in (("train", 8), ("test", 4)):
        columns = {"image": [picture(n) for n in range(count)], "label": [n % 2 for n in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits = read_splits(ImageSpec(source=str(tmp_path)))
    assert splits["train"].features["label"].names == ["zebra", "ant"]
    assert list(splits["test"]["label"]) == [0, 1, 0, 1]
    assert np.array_equal(np.asarray(splits["test"][3]["image"]), np.asarray(picture(3)))


def test_declared_classes_hold_for_text_as_well(tmp_path: Path) -> None:
    """As a hub's Parquet files have them, GLUE's unlabelled test split included."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [0, 1, 1, 0]), ("validation", [1, 0]), ("test", [-1, -1])):
        columns = {"text": [f"t{n}" for n in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits = read_splits(TextSpec(source=str(tmp_path)))
    assert list(splits) == ["train", "validation"]
    assert splits["train"].features["label"].names == ["no", "yes"]


def test_plain_parquet_holds_bytes_under_names_of_its_own(tmp_path: Path) -> None:
    rows = [{"photo": png(n), "kind": ("x", "y")[n % 2]} for n in range(10)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    spec = ImageSpec(source=str(tmp_path / "all.parquet"), image_column="photo", label_column="kind")
    splits = read_splits(spec)
    assert (len(splits["train"]), len(splits["validation"])) == (9, 1)
    assert splits["train"][0]["image"].size == (20, 20)


def test_a_hub_data_set_under_its_own_names_is_not_decoded_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema of cifar10: columns img and label."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ship", "frog"])})
    columns = {"img": [{"bytes": png(n), "path": "pets/0.png"} for n in range(6)], "label": [1, 0, 1, 0, 1, 0]}
    split = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name: datasets.DatasetDict({"train": split, "test": split})
    )
    splits = read_splits(ImageSpec(source="uoft-cs/cifar10", image_column="img", validation_fraction=0.2))
    assert splits["train"].features["label"].names == ["ship", "frog"]
    assert np.array_equal(np.asarray(splits["test"][5]["image"]), np.asarray(picture(5)))
    assert "unknown column 'image': did you mean 'img'?" in error_of(ImageSpec(source="uoft-cs/cifar10"))


def break_one(folder: Path) -> None:
    (folder / "train" / "dog" / "001.png").write_bytes(b"no image")


def tear_one(folder: Path) -> None:
    path = folder / "test" / "cat" / "002.png"
    path.write_bytes(path.read_bytes()[:100])


def rename_class(folder: Path) -> None:
    (folder / "test" / "dog").rename(folder / "test" / "fox")


def drop_class(folder: Path) -> None:
    for path in (folder / "train" / "dog").iterdir():
        path.unlink()


def drop_train(folder: Path) -> None:
    (folder / "train").rename(folder / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (break_one, "train: row 5 has an image that cannot be read ("),
        (tear_one, "test: row 3 has an image that cannot be read ("),
        (rename_class, "test: row 4 has a label that train lacks: unknown label 'fox'"),
        (drop_class, "train has one class only ('cat')"),
        (drop_train, "no train folder in "),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    folder = write_folder(tmp_path / "pets", {"train": 3, "val": 2, "test": 3})
    change(folder)
    assert error_of(ImageSpec(source=str(folder))).startswith(said)


def test_only_images_that_are_used_must_be_readable(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pets", {"train": 3, "val": 2, "test": 3})
    tear_one(folder)
    outcomes = set()
    for seed in range(12):
        try:
            splits = read_splits(ImageSpec(source=str(folder), test_limit=1, seed=seed))
        except DataError as error:
            outcomes.add(str(error)[:11])
        else:
            outcomes.add(len(splits["test"]))
    assert outcomes == {1, "test: row 3"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"no image", "train: row 3 has an image that cannot be read: no format that Pillow knows"),
        (None, "train: row 3 has no image in column 'image'"),
    ],
)
def test_what_is_no_image_is_named_by_its_row(tmp_path: Path, value: Any, said: str) -> None:
    rows = [{"image": png(n), "label": n % 2} for n in range(2)] + [{"image": value, "label": 0}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "validation.parquet")
    assert error_of(ImageSpec(source=str(tmp_path))).startswith(said)


def test_sources_that_hold_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    assert "holds no image but a kind of text; choose: digits, fashion-mnist" in error_of(ImageSpec(source="trec"))
    assert "run `frostline fetch fashion-mnist`" in error_of(ImageSpec(source="fashion-mnist"))
    (tmp_path / "t.csv").write_text("image,label\ncat.png,1\ndog.png,2\n")
    said = error_of(ImageSpec(source=str(tmp_path / "t.csv")))
    assert said == "train: row 1 has str 'cat.png' in column 'image', which must be an image's bytes"
    (tmp_path / "empty").mkdir()
    assert "train.parquet or train/<class>/<image>" in error_of(ImageSpec(source=str(tmp_path / "empty")))
    (tmp_path / "flat" / "inner").mkdir(parents=True)
    assert "as a folder of images" in error_of(ImageSpec(source=str(tmp_path / "flat")))
    picture(0).save(tmp_path / "flat" / "inner" / "0.png")
    assert "train has one class only ('inner')" in error_of(ImageSpec(source=str(tmp_path / "flat")))
