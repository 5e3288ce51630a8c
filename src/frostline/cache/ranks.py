"""What the ranks of a run say to each other beside training: through the process group's key-value store.

Nobody takes part in a collective for it, so uneven inputs cannot hang a run.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["Circle", "key_value_store", "neighbours", "ranks"]

logger = logging.getLogger("frostline")

# For the first rank of a machine to lock a folder; it is at it when another one asks.
_PATIENCE = timedelta(seconds=60)
# Looks at who else is there, one after the other; from then on one in so many.
_LOOKS, _SPARSE = 64, 16


def ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def neighbours() -> int:
    """Processes of this run on this machine, that share what is free."""
    told = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun; other launchers say nothing of machines: then all are here
    return max(1, int(told)) if told else ranks()


def key_value_store() -> Any:
    """The one that the process group was made with."""
    # Not at the top: a torch without distributed lacks it.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


class Circle:
    """The ranks of one run on one machine, that share records.

    Args:
        store: a key-value store (:func:`key_value_store`).
        name: what is shared, the same on every rank.
        size: how many ranks there are on this machine.
        limit: takes a code and a message where something is not shared (law 8).

    Attributes:
        number: of this member, from 0 in the order in which they came.

    Raises:
        OSError: there are more of them than ``size``.
    """

    def __init__(
        self, store: Any, name: str, size: int, limit: Callable[[str, str], None] = lambda code, message: None
    ) -> None:
        self._store, self._name, self.size = store, f"frostline/{name}/{_machine()}", size
        self._limit = limit
        self.number: int = store.add(f"{self._name}/members", 1) - 1
        if self.number >= size:
            raise OSError(f"{self.number + 1} processes on this machine, and LOCAL_WORLD_SIZE says {size}")
        self._known = {self.number}
        self._looks = 0

    def tell(self, what: str, value: str) -> None:
        """Say something to all members, once."""
        self._store.set(f"{self._name}/{what}", value)

    def told(self, what: str) -> str:
        """What a member says, or is about to say.

        Raises:
            OSError: it did not come to it.
        """
        try:
            self._store.wait([f"{self._name}/{what}"], _PATIENCE)
            return str(self._store.get(f"{self._name}/{what}").decode())
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            raise OSError(f"no rank of this machine has told the {what}: {error}") from None

    def introduce(self, log: int, files: dict[int, int]) -> None:
        """Say to all members which open files hold this one's records, by number, and which its log."""
        about = {"log": _describe(log), "files": {number: _describe(file) for number, file in files.items()}}
        self.tell(str(self.number), json.dumps(about))

    def leave(self) -> None:
        """Whoever has not opened this member's files yet shall not: what has their numbers now may be others."""
        with suppress(Exception):  # the store may have gone before
            self.tell(str(self.number), "")

    def newcomers(self) -> list[tuple[int, dict[int, int]]]:
        """Logs and files of members who have introduced themselves since the last call, opened."""
        if len(self._known) >= self.size:
            return []
        self._looks += 1
        if self._looks > _LOOKS and self._looks % _SPARSE:
            return []
        found = []
        for number in sorted(set(range(self._store.add(f"{self._name}/members", 0))) - self._known):
            name = f"{self._name}/{number}"
            if self._store.check([name]):
                self._known.add(number)
                if told := self._store.get(name).decode():
                    try:
                        found.append(_open_all(json.loads(told)))
                    except OSError as error:
                        self.lost(error)
        return found

    def lost(self, error: Exception) -> None:
        """Say that records of another rank cannot be read."""
        logger.debug("records of another rank cannot be read", exc_info=True)
        self._limit("cache-shared", f"records of other ranks cannot be read: {type(error).__name__}: {error}")


def _describe(file: int) -> list[Any]:
    """Where another process of this user finds a file that this one has open, and how it knows that it is the one."""
    about = os.fstat(file)
    return [f"/proc/{os.getpid()}/fd/{file}", about.st_dev, about.st_ino]


def _open_all(about: dict[str, Any]) -> tuple[int, dict[int, int]]:
    """The log and the files of a member.

    Raises:
        OSError: one of them cannot be opened, or is another by now.
    """
    opened: list[int] = []
    try:
        for path, device, inode in (about["log"], *about["files"].values()):
            opened.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            found = os.fstat(opened[-1])
            if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) != (device, inode):
                raise FileNotFoundError(f"{path} is another file by now")
    except OSError:
        for file in opened:
            os.close(file)
        raise
    return opened[0], dict(zip(map(int, about["files"]), opened[1:], strict=True))


def _machine() -> str:
    """Where processes see each other's open files: the same machine, booted once, and the same container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()
