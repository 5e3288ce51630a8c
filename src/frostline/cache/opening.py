"""Opening the tiers that the options ask for, on one rank or shared between those of a machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from frostline.blocks import BlockStack
from frostline.cache.disk import MANIFEST, DiskStore, invitation
from frostline.cache.options import CacheOptions
from frostline.cache.prefix import PrefixDigest
from frostline.cache.ranks import Circle, key_value_store, neighbours, ranks
from frostline.cache.shared import SharedStore
from frostline.cache.store import MemoryStore, Store
from frostline.cache.tiers import Tiers
from frostline.places import cache_dir

__all__ = ["Opening", "activations_dir"]

logger = logging.getLogger("frostline")

# Of what is free when caching starts; the rest is the run's own.
_SHARE = 0.5
_MOST_RUNS = 16
_NO_BUDGET = 1 << 40
# Parts of a Hugging Face configuration that training, saving and loading write into it; none of them says what the
# model computes (the dtype is that of the parameters).
_WRITTEN_BY_HOSTS = ("_name_or_path", "architectures", "dtype", "problem_type", "torch_dtype", "transformers_version")


class Opening:
    """Opens tiers.

    Args:
        options: which, and how large.
        digest: names the weights that records are made under.
        run: number of this run in the process, the same on every rank.
        limit: takes a code and a message where something cannot be had.
    """

    def __init__(
        self, options: CacheOptions, digest: PrefixDigest, run: int, limit: Callable[[str, str], None]
    ) -> None:
        self._options, self._digest, self._run, self._limit = options, digest, run, limit
        self._circles: dict[str, Circle | None] = {}

    def tiers(self, stack: BlockStack, depth: int) -> Store:
        """Memory of the GPU and of the host, and the disk if the mode says so."""
        device = next(stack.model.parameters()).device
        found: list[Store] = []
        # What is in the memory of one rank's GPU no other rank could read.
        if device.type == "cuda" and self._options.device and ranks() == 1:
            found.append(MemoryStore(self._options.device, device))
        found.append(self._host(depth))
        if self._options.mode == "disk" and (disk := self.disk(stack, depth)) is not None:
            found.append(disk)
        return found[0] if len(found) == 1 else Tiers(*found)

    def memory(self, device: torch.device) -> MemoryStore | SharedStore:
        """A store of the kind that memory records go to, of this process alone and without a budget, to try it."""
        shared = self._circles.get("memory") is not None
        return SharedStore(_NO_BUDGET, prefix=self._digest) if shared else MemoryStore(_NO_BUDGET, device)

    def disk(self, stack: BlockStack, depth: int, *, trial: bool = False) -> DiskStore | None:
        """The disk, or ``None``, and a limit, where it cannot be had.

        ``trial``: a store of this process alone, in a folder that goes with it.
        """
        try:
            disk = self._trial() if trial else self._disk(stack)
            # Below a deeper line weights still train: that they are those of a kept record today says nothing of
            # tomorrow.
            disk.moved(depth)
            return disk
        except Exception as error:  # a folder that cannot be made, weights that cannot be hashed
            logger.debug("cannot open the disk tier", exc_info=True)
            self._limit("cache-disk", f"no boundary activations on disk, only in memory: {error}")
            return None
        finally:
            self._digest.forget(stack)

    def _host(self, depth: int) -> MemoryStore | SharedStore:
        budget = int(_SHARE * _free_memory() / neighbours()) if self._options.memory is None else self._options.memory
        circle = self._circle("memory") if budget else None
        if circle is None:
            return MemoryStore(budget)
        try:
            self._digest(depth)  # now: weights that cannot be hashed would end writing later
            store = SharedStore(budget, prefix=self._digest, circle=circle)
            store.moved(depth)
            return store
        except Exception as error:  # weights that cannot be hashed, no more files may be opened
            self._alone(error)
            return MemoryStore(budget)

    def _trial(self) -> DiskStore:
        root = _root(self._options)
        folder = tempfile.mkdtemp(prefix="trial-", dir=root)
        # What it can take at a time is not the question.
        return DiskStore(folder, _budget(self._options, root), prefix=self._digest, queued=_NO_BUDGET)

    def _disk(self, stack: BlockStack) -> DiskStore:
        """A folder of the run's own, shared by its ranks on this machine.

        The run's key names it: everything that defines a record beside the sample's own inputs and the weights. Runs
        with the same key side by side get one each.
        """
        root, circle = _root(self._options), self._circle("disk")
        about = _about(stack, self._options.codec)
        key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
        names = [key, *(f"{key}-{number}" for number in range(2, _MOST_RUNS + 1))]
        if circle is not None and circle.number:
            names = [invitation(circle)[1]]
        try:
            for name in names:
                with suppress(BlockingIOError):
                    store = DiskStore(
                        root / name, _budget(self._options, root), prefix=self._digest, keep=self._options.keep,
                        circle=circle,
                    )  # fmt: skip
                    break
            else:
                raise OSError(f"other runs use {', '.join(names)} in {root}")
        except BaseException:
            if circle is not None and not circle.number:
                circle.tell("folder", "")
            raise
        if circle is None or not circle.number:
            with suppress(OSError):  # a full disk; it is only for people
                _describe(store.folder / MANIFEST, key, about)
        return store

    def _circle(self, what: str) -> Circle | None:
        if ranks() == 1 or neighbours() == 1:
            return None
        if what not in self._circles:  # a rank comes once
            self._circles[what] = None
            try:
                if not hasattr(os, "memfd_create"):
                    raise OSError("this system has no files that two processes could share without a name")
                self._circles[what] = Circle(
                    key_value_store(), f"records/{self._run}/{what}", neighbours(), self._limit
                )
            except Exception as error:  # a process group without a store, or a store that has gone
                self._alone(error)
        return self._circles[what]

    def _alone(self, error: Exception) -> None:
        logger.debug("cannot share records", exc_info=True)
        self._limit("cache-shared", f"each rank keeps records of its own: {type(error).__name__}: {error}")


def activations_dir() -> Path:
    """Where records on disk go if a run does not say otherwise."""
    return cache_dir() / "activations"


def _root(options: CacheOptions) -> Path:
    root = (options.folder or activations_dir()).expanduser()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def _budget(options: CacheOptions, root: Path) -> int:
    return int(_SHARE * shutil.disk_usage(root).free / neighbours()) if options.disk is None else options.disk


def _describe(manifest: Path, key: str, about: dict[str, Any]) -> None:
    said = {"key": key, "opened": time.strftime("%Y-%m-%d %H:%M:%S"), "process": os.getpid(), **about}
    manifest.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    manifest.chmod(0o600)


def _about(stack: BlockStack, codec: str) -> dict[str, Any]:
    named = [(name, tuple(p.shape), str(p.dtype)) for name, p in sorted(stack.model.named_parameters())]
    config = getattr(stack.model, "config", None)
    said = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    settings = repr(sorted((name, value) for name, value in said.items() if name not in _WRITTEN_BY_HOSTS))
    return {
        "model": type(stack.model).__name__,
        "blocks": len(stack),
        "stack": stack.path,
        "parameters": hashlib.blake2b(repr((named, settings)).encode(), digest_size=8).hexdigest(),
        "codec": codec,
        "torch": torch.__version__,
    }


def _free_memory() -> int:
    """Bytes that are free on this machine, and in this container."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 2 << 30
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)
