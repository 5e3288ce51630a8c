"""What the clock has said about each depth: rank 0's word (law 5), kept in the state and not measured again (law 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["Plan", "Plans"]

# Optimizer steps between two looks at what rank 0 has measured; each is one small broadcast.
_STEPS = 16


class Plan(NamedTuple):
    """``keep``: records are kept and read at this depth; ``disk``: also on disk, where memory is full."""

    keep: bool
    disk: bool


class Plans:
    """Plans by depth. A rank may be faster than another, so with several of them rank 0 measures for all."""

    def __init__(self) -> None:
        self._settled: dict[int, Plan] = {}
        self._proposal: tuple[int, Plan] | None = None
        self._steps = 0

    def of(self, depth: int) -> Plan | None:
        """What holds at a depth; ``None`` before anything has been measured there."""
        return self._settled.get(depth)

    def awaits(self, depth: int) -> bool:
        """Whether this rank has measured, and not heard yet what rank 0 says."""
        return self._proposal is not None and self._proposal[0] == depth

    def propose(self, depth: int, plan: Plan) -> bool:
        """Say what this process has measured; ``True`` where it holds at once, because there is no other rank."""
        if _ranks() > 1:
            self._proposal = (depth, plan)
            return False
        self._settled[depth] = plan
        return True

    def agree(self) -> bool:
        """After every optimizer step, on every rank: take over what rank 0 has said. ``True`` where that was anything.

        What is not agreed yet costs no correctness: a rank that caches and one that does not compute the same.
        """
        self._steps += 1
        if self._steps % _STEPS or _ranks() == 1:
            return False
        said = [self._proposal]
        dist.broadcast_object_list(said, src=0)
        self._proposal = None
        if said[0] is None:
            return False
        depth, plan = said[0]
        self._settled[depth] = Plan(*plan)
        return True

    def forget(self) -> None:
        """A thaw: other weights will be below these depths, and a sample is worth another price."""
        self._settled.clear()
        self._proposal = None

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"settled": {str(depth): list(plan) for depth, plan in self._settled.items()}, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self._settled = {int(depth): Plan(*plan) for depth, plan in state["settled"].items()}
        self._steps = state["steps"]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
