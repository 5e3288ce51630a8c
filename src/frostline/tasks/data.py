"""Labelled text from an asset, from local files or from a hub, checked and cut into fixed splits."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from frostline.errors import DataError, choices_message
from frostline.tasks import assets

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["DataSpec", "read_splits"]

Columns = dict[str, list[Any]]

_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


class DataSpec(BaseModel):
    """Where labelled text comes from, and which part of it is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | dict[Literal["train", "validation", "test"], str] = Field(
        min_length=1,
        description="a fetched asset, a file (.csv, .tsv, .jsonl, .parquet), a folder with train/validation/test "
        "files, a mapping from split to file, or a hub id of the form owner/name",
    )
    subset: str | None = Field(default=None, description="the configuration of a hub data set, e.g. mrpc of GLUE")
    text_column: str = "text"
    text_pair_column: str | None = Field(default=None, description="the second text of a pair")
    label_column: str = "label"
    train_limit: PositiveInt | None = Field(default=None, description="rows, drawn with seed; null: all")
    validation_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    validation_fraction: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="share of train that becomes validation where there is none"
    )
    seed: int = Field(default=0, ge=0)


def read_splits(spec: DataSpec) -> DatasetDict:
    """Read, check and cut the data that ``spec`` names; nothing is written to disk.

    Returns ``train``, ``validation`` and, where there is one, ``test``, in memory, with the columns ``text``,
    ``text_pair`` (pairs only) and ``label`` (a ``ClassLabel``: the same order of classes in every split). Classes
    and labels are checked over whole splits, before the limits cut them, so class ids do not depend on a limit. The
    same ``spec`` gives the same rows in the same order, and a smaller limit a prefix of what a larger one gives.

    Raises :class:`DataError`, one line that names the file or split, the row (from 1, header not counted) and the rule.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    splits, known = _read_hub(spec) if _is_hub(spec) else (_read_local(spec), None)
    splits = {split: _pick(columns, split, spec, known) for split, columns in splits.items()}
    labels = _labels(splits, known)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _carve(splits["train"], spec.validation_fraction, spec.seed)
    limits = {"train": spec.train_limit, "validation": spec.validation_limit, "test": spec.test_limit}
    features = {"text": Value("string"), "text_pair": Value("string"), "label": ClassLabel(names=labels)}
    out = DatasetDict()
    for split in ("train", "validation", "test"):
        if split in splits:
            columns = _limit(splits[split], limits[split], spec.seed)
            chosen = Features({name: features[name] for name in columns})
            out[split] = Dataset.from_dict(columns, features=chosen)
    return out


def _is_hub(spec: DataSpec) -> bool:
    """Whether the source is neither an asset nor something local; a name that can be nothing is an error."""
    source = spec.source
    if isinstance(source, dict) or source in assets.ASSETS or Path(source).expanduser().exists():
        return False
    from frostline.tasks._files import SUFFIXES

    if source.lower().endswith(SUFFIXES) or source.startswith((".", "~", "/")):
        raise DataError(f"no such file or folder: {source!r}")
    assets.resolve(source)
    return True


def _read_local(spec: DataSpec) -> dict[str, Columns]:
    from frostline.tasks._files import read_table

    if spec.subset is not None:
        raise DataError(f"subset={spec.subset!r}: only a hub data set has subsets, and {spec.source!r} is none")
    return {split: read_table(path) for split, path in _local_files(spec.source).items()}


def _local_files(source: str | dict[Literal["train", "validation", "test"], str]) -> dict[str, Path]:
    """The file of each split."""
    if isinstance(source, dict):
        if "train" not in source:
            raise DataError(f"source names no train file, only {', '.join(source) or 'nothing'}")
        return {split: Path(path).expanduser() for split, path in source.items()}
    if source in assets.ASSETS and assets.ASSETS[source].kind != "text":
        texts = ", ".join(sorted(name for name, asset in assets.ASSETS.items() if asset.kind == "text"))
        raise DataError(f"asset {source!r} holds no text but a kind of {assets.ASSETS[source].kind}; choose: {texts}")
    path = Path(assets.resolve(source)).expanduser()
    if not path.is_dir():
        return {"train": path}
    from frostline.tasks._files import SUFFIXES

    found = {}
    for split, stems in _ALIASES.items():
        files = [path / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(
                f"{str(path)!r} has {len(files)} {split} files ({', '.join(f.name for f in files)}): keep one"
            )
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise DataError(f"no train file in {str(path)!r}: expected train{', train'.join(SUFFIXES)}")
    return found


def _read_hub(spec: DataSpec) -> tuple[dict[str, Columns], list[str] | None]:
    """The splits of a hub data set, and the names of its classes where it declares them."""
    from datasets import ClassLabel, load_dataset

    try:
        with quiet_datasets():
            loaded = load_dataset(str(spec.source), spec.subset)
    except Exception as error:  # the hub client raises many kinds, all of them for a user to act on
        said = " ".join(str(error).split())
        raise DataError(f"{spec.source!r} is no local path and cannot be had as a hub data set: {said}") from error
    known: list[str] | None = None
    splits: dict[str, Columns] = {}
    for split, names in _ALIASES.items():
        name = next((n for n in (*names, f"{split}_matched") if n in loaded), None)
        if name is None:
            continue
        wanted = [c for c in (spec.text_column, spec.text_pair_column, spec.label_column) if c is not None]
        unknown = [c for c in wanted if c not in loaded[name].column_names]
        if unknown:
            raise DataError(f"{split}: {choices_message('column', unknown[0], loaded[name].column_names)}")
        feature = loaded[name].features[spec.label_column]
        columns = {c: list(loaded[name][c]) for c in wanted}
        if isinstance(feature, ClassLabel):
            known = list(feature.names)
            # GLUE and others publish a test split without its labels: there is nothing to measure on it.
            if split == "test" and set(columns[spec.label_column]) == {-1}:
                continue
        splits[split] = columns
    if "train" not in splits:
        raise DataError(f"hub data set {spec.source!r} has no train split, only {', '.join(loaded)}")
    return splits, known


def _pick(columns: Columns, split: str, spec: DataSpec, known: Sequence[str] | None) -> Columns:
    """The columns that the task needs, under their plain names, every value checked."""
    if not any(columns.values()):
        raise DataError(f"{split} is empty: it has no rows")
    wanted = {"text": spec.text_column, "text_pair": spec.text_pair_column, "label": spec.label_column}
    for column in wanted.values():
        if column is not None and column not in columns:
            raise DataError(f"{split}: {choices_message('column', column, columns)}")
    picked: Columns = {}
    for name, column in wanted.items():
        if column is None:
            continue
        values = columns[column]
        if name == "label":
            picked[name] = [_label(value, split, row, column, known) for row, value in enumerate(values, start=1)]
        else:
            picked[name] = [_text(value, split, row, column) for row, value in enumerate(values, start=1)]
    return picked


def _missing(value: Any) -> bool:
    """None, NaN, blank, or the way that NaN looks once it went through a CSV file."""
    if isinstance(value, str):
        return value.strip() in ("", "NaN", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, split: str, row: int, column: str) -> str:
    if _missing(value):
        raise DataError(f"{split}: row {row} has no text in column {column!r} (found {value!r})")
    if not isinstance(value, str):
        raise DataError(
            f"{split}: row {row} has {type(value).__name__} {value!r} in column {column!r}, which must be text"
        )
    return value


def _label(value: Any, split: str, row: int, column: str, known: Sequence[str] | None) -> str:
    if _missing(value) or (known is not None and value == -1):
        raise DataError(f"{split}: row {row} has no label in column {column!r} (found {value!r})")
    if known is not None:
        return known[int(value)]
    if isinstance(value, (str, int)):
        return str(value)
    raise DataError(
        f"{split}: row {row} has {type(value).__name__} {value!r} in column {column!r}: a label is text or an integer"
    )


def _labels(splits: dict[str, Columns], known: Sequence[str] | None) -> list[str]:
    """The classes in order: as the hub declares them, else by number where all are numbers, else by name."""
    found = set(splits["train"]["label"])
    if len(found) < 2:
        raise DataError(f"train has one class only ({next(iter(found))!r}): classification needs at least 2")
    for split in ("validation", "test"):
        for row, label in enumerate(splits.get(split, {}).get("label", ()), start=1):
            if label not in found:
                raise DataError(
                    f"{split}: row {row} has a label that train lacks: {choices_message('label', label, found)}"
                )
    if known is not None:
        return list(known)
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


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of ``datasets`` inside: a run shows one bar, its own."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()
