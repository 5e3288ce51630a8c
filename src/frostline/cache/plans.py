"""What the clock has said about each depth: rank 0's word (law 5), kept in the state and not measured again (law 4)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from frostline.cache.ranks import key_value_store, ranks

__all__ = ["Plan", "Plans"]

# Optimizer steps between two looks at what rank 0 has said.
_STEPS = 16
# The same program makes the same runs in the same order on every rank.
_runs = itertools.count()


class Plan(NamedTuple):
    """What is done at one depth.

    ``keep``: records are kept and read; ``disk``: also on disk, where memory is full (``None``: not asked yet);
    ``proved``: the first batches that were read have been timed, too.
    """

    keep: bool
    disk: bool | None = None
    proved: bool = False


class Plans:
    """Plans by depth. A rank may be faster than another, so with several of them rank 0 measures for all.

    Rank 0 says it through the process group's key-value store, which nobody waits for: until a rank has heard of it, it
    caches, and that costs no correctness (a rank that caches and one that does not compute the same).
    """

    def __init__(self) -> None:
        self._settled: dict[int, Plan] = {}
        self._awaited: set[int] = set()
        self._steps = self._said = 0
        self.run = next(_runs)
        self.deaf = False  # rank 0 cannot be heard

    def of(self, depth: int) -> Plan | None:
        """What holds at a depth; ``None`` before anything has been measured there."""
        return self._settled.get(depth)

    def awaits(self, depth: int) -> bool:
        """Whether this rank has measured, and not heard yet what rank 0 says."""
        return depth in self._awaited

    def propose(self, depth: int, plan: Plan) -> bool:
        """Say what this process has measured; ``True`` where it holds, because this is rank 0 or there is no other."""
        if ranks() > 1:
            if dist.get_rank() != 0:
                self._awaited.add(depth)
                return False
            key_value_store().set(self._key(), json.dumps([depth, *plan]))
            self._said += 1
        self._settled[depth] = plan
        return True

    def agree(self) -> bool:
        """After every optimizer step: take over what rank 0 has said. ``True`` where that was anything."""
        self._steps += 1
        if self._steps % _STEPS or self.deaf or ranks() == 1 or dist.get_rank() == 0:
            return False
        store, heard = key_value_store(), False
        while store.check([self._key()]):
            depth, *plan = json.loads(store.get(self._key()))
            self._settled[depth] = Plan(*plan)
            self._awaited.discard(depth)
            self._said += 1
            heard = True
        return heard

    def forget(self) -> None:
        """A thaw: other weights will be below these depths, and a sample is worth another price."""
        self._settled.clear()
        self._awaited.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {str(depth): list(plan) for depth, plan in self._settled.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self._settled = {int(depth): Plan(*plan) for depth, plan in state.items()}

    def _key(self) -> str:
        return f"frostline/plans/{self.run}/{self._said}"
