"""From downloaded parts to image data sets: Parquet files with the columns ``image`` (PNG) and ``label``.

Each function takes the downloaded parts and fills an empty folder with ``train.parquet``, ``validation.parquet`` and
``test.parquet``. The splits are fixed: same parts in, same pixels and classes in the same order out.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frostline.errors import DataError
from frostline.tasks._quiet import quiet_datasets
from frostline.tasks._unpack import split_rows

__all__ = ["digits", "fashion_mnist"]

_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDER = "./usr/share/datasets/fashion-mnist"
_AR_MAGIC = b"!<arch>\n"

Images = NDArray[np.uint8]
Rows = Sequence[tuple[Images, int]]


def digits(parts: Sequence[Path], folder: Path) -> None:
    """Hand-written digits that scikit-learn carries, 8 x 8 grey. 1,257 / 180 / 360 rows."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("asset 'digits' needs scikit-learn: pip install 'frostline[hf]'") from error
    found = load_digits()
    # From 0..16 to 0..255.
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    rows = list(zip(images, found.target.tolist(), strict=True))
    _write_splits(folder, split_rows(rows, validation=180, test=360), [str(name) for name in found.target_names])


def fashion_mnist(parts: Sequence[Path], folder: Path) -> None:
    """Zalando's article images, 28 x 28 grey; train and test are given. 54,000 / 6,000 / 10,000 rows."""
    with tarfile.open(fileobj=io.BytesIO(_member(parts[0], "data.tar"))) as package:
        train, test = (_idx_rows(package, stem) for stem in ("train", "t10k"))
    splits = split_rows(train, validation=min(6000, round(0.1 * len(train))), test=0)
    _write_splits(folder, {**splits, "test": test}, _FASHION)


def _member(package: Path, stem: str) -> bytes:
    """The member of a Debian package whose name begins with ``stem``.

    A ``.deb`` is an ``ar`` archive (deb(5), ar(5)): members after a magic line, each a header of 60 bytes (name in the
    first 16, size as text in 48..58) and its content, padded to an even offset.
    """
    content = package.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise DataError(f"{package.name} is no Debian package")
    offset = len(_AR_MAGIC)
    while offset < len(content):
        name, size = content[offset : offset + 16].decode("ascii"), int(content[offset + 48 : offset + 58])
        start = offset + 60
        if name.startswith(stem):
            return content[start : start + size]
        offset = start + size + size % 2
    raise DataError(f"{package.name} has no member {stem}")


def _idx_rows(package: tarfile.TarFile, stem: str) -> list[tuple[Images, int]]:
    """The images and labels of one split: ``STEM-images-idx3-ubyte.gz`` and ``STEM-labels-idx1-ubyte.gz``."""
    images, labels = (
        _idx(package, f"{_FASHION_FOLDER}/{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1")
    )
    return list(zip(images, labels.tolist(), strict=True))


def _idx(package: tarfile.TarFile, name: str) -> Images:
    """An IDX file (Yann LeCun's format): 0, 0, a type (8: bytes), the number of dimensions, each size, the values."""
    member = package.extractfile(name)
    assert member is not None, "a file, not a folder"
    content = gzip.decompress(member.read())
    zero, kind, dimensions = struct.unpack_from(">HBB", content)
    if (zero, kind) != (0, 8):
        raise DataError(f"{name} is no IDX file of bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _write_splits(folder: Path, splits: Mapping[str, Rows], classes: Sequence[str]) -> None:
    """Write each split as ``datasets`` does, so that whatever reads its files knows images and classes."""
    try:
        from datasets import ClassLabel, Dataset, Features, Image
        from PIL import Image as pillow
    except ImportError as error:
        raise DataError(f"images need datasets and Pillow: pip install 'frostline[hf,images]' ({error})") from error
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    with quiet_datasets():
        for split, rows in splits.items():
            columns = {"image": [pillow.fromarray(image) for image, _ in rows], "label": [label for _, label in rows]}
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
