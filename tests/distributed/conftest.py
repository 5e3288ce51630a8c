"""A process group of the test's own process, for what needs one and no second rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

# Callbacks of PowerSGD hold the group in a thread of the group's own, a moment longer than training waits for them.
# Were theirs the last reference, the group would end there and wait for that very thread: torch aborts the process
# ("terminate called after throwing an instance of 'std::system_error' what(): Resource deadlock avoided").
_KEPT: list[Any] = []


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, which outlives its end."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _KEPT.append(dist.group.WORLD)
    yield
    dist.destroy_process_group()
