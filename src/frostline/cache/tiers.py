"""Opening the tiers that a run asks for, and using several as one store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostline.blocks import BlockStack
from frostline.cache.disk import DiskStore
from frostline.cache.options import CacheOptions
from frostline.cache.plans import ranks
from frostline.cache.store import HostStore, Record, Store
from frostline.places import cache_dir

__all__ = ["Tiers", "activations_dir", "open_disk", "open_host"]

# Of what is free when caching starts; the rest is the run's own.
_SHARE = 0.5
_MOST_RUNS = 16
# Parts of a Hugging Face configuration that training, saving and loading write into it; none of them says what the
# model computes (the dtype is that of the parameters).
_WRITTEN_BY_HOSTS = ("_name_or_path", "architectures", "dtype", "problem_type", "torch_dtype", "transformers_version")


class Tiers:
    """Several stores as one, the fastest first: a record goes to the first tier that has room for it and stays there.

    It is upgraded where it is, because its space there is its own.
    """

    def __init__(self, *tiers: Store) -> None:
        self.tiers = tiers

    @property
    def records(self) -> int:
        return sum(tier.records for tier in self.tiers)

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self.tiers)

    @property
    def torn(self) -> int:
        return sum(tier.torn for tier in self.tiers)

    @property
    def lost(self) -> int:
        return sum(tier.lost for tier in self.tiers)

    @property
    def failure(self) -> str | None:
        return next((tier.failure for tier in self.tiers if tier.failure is not None), None)

    def holds(self, key: bytes) -> bool:
        return any(tier.holds(key) for tier in self.tiers)

    @property
    def reads_ahead(self) -> bool:
        return any(tier.reads_ahead and tier.records for tier in self.tiers)

    def expect(self, keys: Sequence[bytes]) -> None:
        for tier in self.tiers:
            tier.expect(keys)
            keys = [key for key in keys if not tier.holds(key)]

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        records: list[Record | None] = [None] * len(keys)
        for tier in self.tiers:
            missing = [place for place, record in enumerate(records) if record is None]
            for place, record in zip(missing, tier.get_many([keys[place] for place in missing]), strict=True):
                records[place] = record
        return records

    def put(self, key: bytes, depth: int, value: Tensor) -> bool:
        holder = next((tier for tier in self.tiers if tier.holds(key)), None)
        if holder is not None and holder.put(key, depth, value):
            return True
        return any(tier.put(key, depth, value) for tier in self.tiers if tier is not holder)

    def depths(self) -> set[int]:
        return set().union(*(tier.depths() for tier in self.tiers))

    def drop_deeper(self, depth: int) -> int:
        return sum(tier.drop_deeper(depth) for tier in self.tiers)

    def clear(self) -> None:
        for tier in self.tiers:
            tier.clear()

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()


def activations_dir() -> Path:
    """Where records on disk go if a run does not say otherwise."""
    return cache_dir() / "activations"


def open_host(options: CacheOptions) -> HostStore:
    """The tier in host memory."""
    return HostStore(int(_SHARE * _free_memory() / _neighbours()) if options.memory is None else options.memory)


def open_disk(options: CacheOptions, stack: BlockStack, prefix: Callable[[int], bytes]) -> DiskStore:
    """The tier on disk, in a folder of its own under the one that the options name.

    The run's key names it: everything that defines a record beside the sample's own inputs and the weights. Runs
    with the same key side by side get one each.

    Raises:
        OSError: the folder cannot be made or written.
    """
    root = (options.folder or activations_dir()).expanduser()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    budget = int(_SHARE * shutil.disk_usage(root).free / _neighbours()) if options.disk is None else options.disk
    about = _about(stack, options.codec)
    key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    for number in range(1, _MOST_RUNS + 1):
        folder = root / (key if number == 1 else f"{key}-{number}")
        with suppress(BlockingIOError):
            store = DiskStore(folder, budget, prefix=prefix, keep=options.keep)
            try:
                _describe(folder / "manifest.json", key, about)
            except BaseException:
                store.close()
                raise
            return store
    raise OSError(f"{_MOST_RUNS} runs use {root / key} at the same time")


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


def _neighbours() -> int:
    """Processes of this run on this machine, that share what is free."""
    told = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun; other launchers say nothing of machines: then all are here
    return max(1, int(told)) if told else ranks()


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
