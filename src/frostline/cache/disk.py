"""Records on disk.

Eleven libraries were measured to be 1.1 to 25 times slower at cold random reads than positional reads from a flat
file, so this is our own; ``frostline.cache.slots`` has the format.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from frostline.cache.files import SlotFile
from frostline.cache.ranks import Circle
from frostline.cache.slots import file_numbers, slots_name
from frostline.cache.slotstore import SlotStore

__all__ = ["LOCK", "MANIFEST", "DiskStore", "invitation"]

LOCK, MANIFEST = "lock", "manifest.json"


class DiskStore(SlotStore):
    """A :class:`~frostline.cache.slotstore.SlotStore` in a folder that only its owner can read.

    Args:
        folder: made if it is not there; records in it are found again.
        budget: bytes at most.
        prefix: hash (16 bytes) of the weights below a depth; a record under other weights is not used.
        threads: readers at a time.
        keep: leave the records there at :meth:`close`.
        queued: bytes that may wait to be written.
        circle: the ranks that share the folder. Files of an earlier run are dealt out among them.

    Raises:
        BlockingIOError: another run uses the folder.
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self, folder: str | Path, budget: int, *, prefix: Callable[[int], bytes], threads: int = 8,
        queued: int = 64 << 20, keep: bool = False, circle: Circle | None = None,
    ) -> None:  # fmt: skip
        self.folder, self._keep = Path(folder), keep
        number, of = (0, 1) if circle is None else (circle.number, circle.size)
        if circle is None or number == 0:
            self._held, token = _take(self.folder)
        else:
            self._held = _join(self.folder, invitation(circle)[0])
        files: list[SlotFile] = []
        try:
            if circle is not None and number == 0:  # now the others may come in
                circle.tell("folder", f"{token} {self.folder.name}")
            numbers = {number, *(n for n in file_numbers(self.folder) if n % of == number)}
            for n in sorted(numbers):
                data = self.folder / slots_name(n)
                files.append(SlotFile(n, _open(data), _open(data.with_suffix(".idx"))))
            super().__init__(
                files, budget, prefix=prefix, threads=threads, queued=queued, where=str(folder), circle=circle
            )  # fmt: skip
        except BaseException:
            for file in files:
                file.close()
            os.close(self._held)
            raise

    def cool(self) -> None:
        """Write everything out and drop it from the page cache: what is read next comes from the disk."""
        self.flush()
        for file in self._data.values():
            os.fsync(file)
        self.uncache()

    def uncache(self) -> None:
        """Drop what has been written out from the page cache."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for file in self._data.values():
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Stop reading and writing. Without ``keep`` the records are user data that nobody asked to be kept: gone."""
        if self._closed:
            return
        super().close()
        with suppress(OSError):  # others of this run are still here; or the folder is gone
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._keep:
                self._remove()
        with suppress(OSError):
            fcntl.flock(self._held, fcntl.LOCK_UN)  # a forked worker of a loader may hold a copy of the handle
        os.close(self._held)

    def _remove(self) -> None:
        names = [slots_name(number) for number in file_numbers(self.folder)]
        for name in (*names, *(Path(name).with_suffix(".idx").name for name in names), MANIFEST, LOCK):
            with suppress(OSError):
                (self.folder / name).unlink()
        with suppress(OSError):  # not empty: somebody else's files
            self.folder.rmdir()


def invitation(circle: Circle) -> tuple[str, str]:
    """What the rank that opens a folder for all says of it: its token and its name.

    Raises:
        OSError: that rank has failed.
    """
    token, _, name = circle.told("folder").partition(" ")
    if not name:
        raise OSError("the rank that opens the folder for all has failed")
    return token, name


def _take(folder: Path) -> tuple[int, str]:
    """Lock a folder for a run; with the token its other ranks may come in (:func:`_join`), and no other run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = _open(folder / LOCK)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        token = os.urandom(8).hex()
        os.ftruncate(held, 0)
        os.pwrite(held, token.encode(), 0)
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _assert_at(held, folder / LOCK)
    except BaseException:
        os.close(held)
        raise
    return held, token


def _join(folder: Path, token: str) -> int:
    """Hold the lock of a folder that another rank of this run has taken."""
    held = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _assert_at(held, folder / LOCK)
        if os.pread(held, 64, 0).decode() != token:
            raise BlockingIOError(f"{folder} is another run's by now")
    except BaseException:
        os.close(held)
        raise
    return held


def _assert_at(file: int, path: Path) -> None:
    """A lock on a file that somebody has unlinked meanwhile would lock nothing."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(file), path.stat()):
            return
    raise BlockingIOError(f"{path} was taken away at this moment")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
