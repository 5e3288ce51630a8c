"""Labelled text and images from an asset, from local files or from a hub, checked and cut into fixed splits."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from frostline.errors import DataError, choices_message

if TYPE_CHECKING:
    from datasets import DatasetDict

    from frostline.tasks._sources import Columns, Split

__all__ = ["DataSpec", "ImageSpec", "TextSpec", "read_splits"]

# Beside our columns while they are checked and cut: where a row stood, for an error that is found later.
_PLACE = "place"


class DataSpec(BaseModel):
    """Where labelled samples come from, and which part of them is used.

    What they are, and which columns they are in, :class:`TextSpec` and :class:`ImageSpec` say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[Literal["text", "image"]]

    source: str | dict[Literal["train", "validation", "test"], str] = Field(
        min_length=1,
        description="a fetched asset, a file (.csv, .tsv, .jsonl, .parquet), a folder with train/validation/test "
        "files, a mapping from split to file, or a hub id of the form owner/name; for images also a folder with "
        "train/<class>/<image>",
    )
    subset: str | None = Field(default=None, description="the configuration of a hub data set, e.g. mrpc of GLUE")
    label_column: str = "label"
    train_limit: PositiveInt | None = Field(default=None, description="rows, drawn with seed; null: all")
    validation_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    validation_fraction: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="share of train that becomes validation where there is none"
    )
    seed: int = Field(default=0, ge=0)

    def columns(self) -> dict[str, str]:
        """The columns that the task needs: our name of each, and its name in the source."""
        raise NotImplementedError


class TextSpec(DataSpec):
    """Labelled text, or pairs of texts."""

    kind: ClassVar[Literal["text", "image"]] = "text"

    text_column: str = "text"
    text_pair_column: str | None = Field(default=None, description="the second text of a pair")

    def columns(self) -> dict[str, str]:
        pair = {} if self.text_pair_column is None else {"text_pair": self.text_pair_column}
        return {"text": self.text_column, **pair, "label": self.label_column}


class ImageSpec(DataSpec):
    """Labelled images."""

    kind: ClassVar[Literal["text", "image"]] = "image"

    image_column: str = "image"

    def columns(self) -> dict[str, str]:
        return {"image": self.image_column, "label": self.label_column}


def read_splits(spec: DataSpec) -> DatasetDict:
    """Read, check and cut the data that ``spec`` names; nothing is left on disk.

    Returns ``train``, ``validation`` and, where there is one, ``test``, in memory, with the columns that
    ``spec.columns()`` names; ``label`` is a ``ClassLabel`` with the same order of classes in every split. Images are
    kept as they are stored (bytes, or the path of a local file) and decoded when a row is looked at. Classes
    and labels are checked over whole splits, before the limits cut them, so class ids do not depend on a limit; that
    images can be decoded is checked for the rows that are used. The same ``spec`` gives the same rows in the same
    order, and a smaller limit a prefix of what a larger one gives.

    Raises :class:`DataError`, one line that names the file or split, the row (from 1, header not counted) and the rule.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    # Here, because it reads with pyarrow, which comes with `datasets`.
    from frostline.tasks._sources import read_source

    sources = read_source(spec)
    # GLUE and others publish a test split without its labels: there is nothing to measure on it.
    if "test" in sources and _is_unlabelled(sources["test"], spec):
        del sources["test"]
    splits = {name: _pick(split, name, spec) for name, split in sources.items()}
    labels = _labels(splits, sources["train"].classes)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _carve(splits["train"], spec.validation_fraction, spec.seed)
    limits = {"train": spec.train_limit, "validation": spec.validation_limit, "test": spec.test_limit}
    known = {"text": Value("string"), "text_pair": Value("string"), "image": Image(), "label": ClassLabel(names=labels)}
    features = Features({name: known[name] for name in spec.columns()})
    out = DatasetDict()
    for split in ("train", "validation", "test"):
        if split in splits:
            columns = _limit(splits[split], limits[split], spec.seed)
            places = columns.pop(_PLACE)
            if "image" in columns:
                _check_readable(columns["image"], places)
            out[split] = Dataset.from_dict(columns, features=features)
    return out


def _is_unlabelled(split: Split, spec: DataSpec) -> bool:
    return split.classes is not None and set(split.columns.get(spec.label_column, ())) == {-1}


def _pick(split: Split, name: str, spec: DataSpec) -> Columns:
    """The columns that the task needs, under our names, every value checked, and the place of each row."""
    if not any(split.columns.values()):
        raise DataError(f"{name} is empty: it has no rows")
    wanted = spec.columns()
    for column in wanted.values():
        if column not in split.columns:
            raise DataError(f"{name}: {choices_message('column', column, split.columns)}")
    places = [f"{name}: row {row}" for row in range(1, len(split.columns[spec.label_column]) + 1)]
    picked: Columns = {_PLACE: places}
    for ours, column in wanted.items():
        rows = zip(split.columns[column], places, strict=True)
        if ours == "label":
            picked[ours] = [_label(value, place, column, split.classes) for value, place in rows]
        elif ours == "image":
            picked[ours] = [_image(value, place, column) for value, place in rows]
        else:
            picked[ours] = [_text(value, place, column) for value, place in rows]
    return picked


def _missing(value: Any) -> bool:
    """None, NaN, blank, or the way that NaN looks once it went through a CSV file."""
    if isinstance(value, str):
        return value.strip() in ("", "NaN", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, place: str, column: str) -> str:
    if _missing(value):
        raise DataError(f"{place} has no text in column {column!r} (found {value!r})")
    if not isinstance(value, str):
        raise DataError(f"{place} has {type(value).__name__} {value!r} in column {column!r}, which must be text")
    return value


def _image(value: Any, place: str, column: str) -> dict[str, Any]:
    """An image file as ``datasets`` stores it: its bytes, or else its path."""
    if isinstance(value, bytes):
        value = {"bytes": value}
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is not None:
            # The name that a file had elsewhere must not be taken for one that is here.
            return {"bytes": content, "path": None}
        if path is not None:
            return {"bytes": None, "path": path}
    if value is None or isinstance(value, Mapping):
        raise DataError(f"{place} has no image in column {column!r}")
    raise DataError(
        f"{place} has {type(value).__name__} {str(value)[:40]!r} in column {column!r}, which must be an image's bytes"
    )


def _check_readable(images: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Decode every image once: it costs what an epoch does, and no run dies of one file in its third hour."""
    from datasets import Image

    try:
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise DataError("images need Pillow: pip install 'frostline[images]'") from error
    decoder = Image()
    for image, place in zip(images, places, strict=True):
        try:
            decoder.decode_example(dict(image))
        except Exception as error:  # Pillow raises many kinds, and each format's reader its own
            unknown = isinstance(error, UnidentifiedImageError)
            said = "no format that Pillow knows" if unknown else " ".join(str(error).split()) or type(error).__name__
            file = f" ({image['path']})" if image["path"] else ""
            raise DataError(f"{place} has an image that cannot be read{file}: {said}") from error


def _label(value: Any, place: str, column: str, classes: Sequence[str] | None) -> str:
    if _missing(value) or (classes is not None and value == -1):
        raise DataError(f"{place} has no label in column {column!r} (found {value!r})")
    if classes is not None:
        return classes[int(value)]
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(f"{place} has {type(value).__name__} {value!r} in column {column!r}: a label is text or an integer")


def _labels(splits: Mapping[str, Columns], declared: Sequence[str] | None) -> list[str]:
    """The classes in order: as the source declares them, else by number where all are numbers, else by name."""
    found = set(splits["train"]["label"])
    if len(found) < 2:
        raise DataError(f"train has one class only ({next(iter(found))!r}): classification needs at least 2")
    for split in ("validation", "test"):
        columns = splits.get(split, {"label": [], _PLACE: []})
        for label, place in zip(columns["label"], columns[_PLACE], strict=True):
            if label not in found:
                raise DataError(f"{place} has a label that train lacks: {choices_message('label', label, found)}")
    if declared is not None:
        return list(declared)
    if all(label.isascii() and label.isdigit() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def _carve(columns: Columns, fraction: float, seed: int) -> tuple[Columns, Columns]:
    """Take a seeded ``fraction`` of the rows away as validation; at least one row on each side."""
    rows = len(columns["label"])
    held = min(max(1, round(rows * fraction)), rows - 1)
    order = _order(rows, seed)
    # What stays keeps its order: training shuffles it anyway, and a reader finds the file again.
    return _rows(columns, sorted(order[held:])), _rows(columns, order[:held])


def _limit(columns: Columns, limit: int | None, seed: int) -> Columns:
    rows = len(columns["label"])
    return columns if limit is None or limit >= rows else _rows(columns, _order(rows, seed)[:limit])


def _order(rows: int, seed: int) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


def _rows(columns: Columns, rows: Sequence[int]) -> Columns:
    return {name: [values[row] for row in rows] for name, values in columns.items()}
