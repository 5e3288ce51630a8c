"""Where labelled samples lie (assets, local files, folders of images, hub data sets), read column by column."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from frostline.errors import DataError, choices_message
from frostline.tasks import assets
from frostline.tasks._files import SUFFIXES, read_table
from frostline.tasks._quiet import quiet_datasets

if TYPE_CHECKING:
    from datasets import Dataset

    from frostline.tasks.data import DataSpec

__all__ = ["Columns", "Split", "read_source"]

Columns = dict[str, list[Any]]

_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Split:
    """The columns of one split under their own names; ``classes`` are what its labels count, where the source says."""

    columns: Columns
    classes: Sequence[str] | None = None


def read_source(spec: DataSpec) -> dict[str, Split]:
    """The splits of what ``spec`` names, ``train`` among them. Images are ``{"bytes", "path"}``, not decoded.

    Raises :class:`DataError`, one line that names the source and what is wrong with it.
    """
    if _is_hub(spec.source):
        return _read_hub(spec)
    if spec.subset is not None:
        raise DataError(f"subset={spec.subset!r}: only a hub data set has subsets, and {spec.source!r} is none")
    return _read_local(spec)


def _is_hub(source: str | dict[Literal["train", "validation", "test"], str]) -> bool:
    """Whether the source is neither an asset nor something local; a name that can be nothing is an error."""
    if isinstance(source, dict) or source in assets.ASSETS or Path(source).expanduser().exists():
        return False
    if source.lower().endswith(SUFFIXES) or source.startswith((".", "~", "/")):
        raise DataError(f"no such file or folder: {source!r}")
    assets.resolve(source)
    return True


def _read_local(spec: DataSpec) -> dict[str, Split]:
    source = spec.source
    if isinstance(source, dict):
        if "train" not in source:
            raise DataError(f"source names no train file, only {', '.join(source) or 'nothing'}")
        return {split: _read_file(Path(path).expanduser(), spec) for split, path in source.items()}
    if source in assets.ASSETS and assets.ASSETS[source].kind != spec.kind:
        fitting = ", ".join(sorted(name for name, asset in assets.ASSETS.items() if asset.kind == spec.kind))
        raise DataError(
            f"asset {source!r} holds no {spec.kind} but a kind of {assets.ASSETS[source].kind}; choose: {fitting}"
        )
    path = Path(assets.resolve(source)).expanduser()
    if not path.is_dir():
        return {"train": _read_file(path, spec)}
    files = _files_of(path)
    if not files and spec.kind == "image" and any(child.is_dir() for child in path.iterdir()):
        return _read_image_folder(path, spec)
    if "train" not in files:
        images = " or train/<class>/<image>" if spec.kind == "image" else ""
        raise DataError(f"no train file in {str(path)!r}: expected train{', train'.join(SUFFIXES)}{images}")
    return {split: _read_file(file, spec) for split, file in files.items()}


def _read_file(path: Path, spec: DataSpec) -> Split:
    columns, classes = read_table(path)
    return Split(columns, classes.get(spec.label_column))


def _files_of(folder: Path) -> dict[str, Path]:
    """The file of each split."""
    found = {}
    for split, stems in _ALIASES.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(
                f"{str(folder)!r} has {len(files)} {split} files ({', '.join(f.name for f in files)}): keep one"
            )
        if files:
            found[split] = files[0]
    return found


def _read_image_folder(path: Path, spec: DataSpec) -> dict[str, Split]:
    """``<split>/<class>/<image>``, or ``<class>/<image>`` for train alone, as ``datasets`` reads it."""
    # The builder itself: `load_dataset` counts its uses on a server first.
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    folders = {
        split: next((name for name in names if (path / name).is_dir()), None) for split, names in _ALIASES.items()
    }
    patterns = {split: [f"{name}/**"] for split, name in folders.items() if name is not None} or {"train": ["**"]}
    if "train" not in patterns:
        raise DataError(f"no train folder in {str(path)!r}, only {', '.join(patterns)}")
    try:
        # What it writes while it reads goes at once: the images stay where they are, and only their paths are kept.
        with tempfile.TemporaryDirectory() as scratch, quiet_datasets():
            # Left to itself it takes a folder with a single class for one without labels.
            builder = ImageFolder(
                cache_dir=scratch, base_path=str(path.resolve()), data_files=patterns, drop_labels=False
            )
            builder.download_and_prepare()
            loaded = builder.as_dataset(in_memory=True)
    except Exception as error:  # the builder raises many kinds, all of them about what lies in the folder
        said = " ".join(str(error).split())
        raise DataError(f"cannot read {str(path)!r} as a folder of images (train/<class>/<image>): {said}") from error
    if spec.label_column not in loaded["train"].column_names:
        raise DataError(f"no classes in {str(path)!r}: expected train/<class>/<image> with two classes or more")
    return {split: _declared(rows, split, spec) for split, rows in loaded.items()}


def _read_hub(spec: DataSpec) -> dict[str, Split]:
    from datasets import load_dataset

    try:
        with quiet_datasets():
            loaded = load_dataset(str(spec.source), spec.subset)
    except Exception as error:  # the hub client raises many kinds, all of them for a user to act on
        said = " ".join(str(error).split())
        raise DataError(f"{spec.source!r} is no local path and cannot be had as a hub data set: {said}") from error
    splits = {}
    for split, names in _ALIASES.items():
        name = next((n for n in (*names, f"{split}_matched") if n in loaded), None)
        if name is not None:
            splits[split] = _declared(loaded[name], split, spec)
    if "train" not in splits:
        raise DataError(f"hub data set {spec.source!r} has no train split, only {', '.join(loaded)}")
    return splits


def _declared(rows: Dataset, split: str, spec: DataSpec) -> Split:
    """The columns that ``spec`` wants of a data set that declares their types."""
    from datasets import ClassLabel, Image

    wanted = list(spec.columns().values())
    unknown = [column for column in wanted if column not in rows.column_names]
    if unknown:
        raise DataError(f"{split}: {choices_message('column', unknown[0], rows.column_names)}")
    for column in wanted:
        if isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image(decode=False))
    label = rows.features[spec.label_column]
    classes = list(label.names) if isinstance(label, ClassLabel) else None
    return Split({column: list(rows[column]) for column in wanted}, classes)
