"""Starting a test module on several real ranks, as benchmarks do; and a process group of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from benchmarks.ranks import ROOT, launch, start

__all__ = ["ROOT", "alone", "launch", "start"]

# Callbacks of PowerSGD hold the group in a thread of the group's own, a moment longer than training waits for them.
# Were theirs the last reference, the group would end there and wait for that very thread: torch aborts the process
# ("terminate called after throwing an instance of 'std::system_error' what(): Resource deadlock avoided").
_KEPT: list[Any] = []


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one, which outlives its end."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _KEPT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()
