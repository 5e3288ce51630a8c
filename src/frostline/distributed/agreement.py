"""How ranks come to the same decision: they decide on the same numbers.

Gradients are reduced before they are measured, so every rank measures the same, and a mean of scores is never taken.
But kernels of unlike devices round differently, and of two blocks that are nearly equal each rank could freeze
another one. So a policy is shown what the first rank measured, on every rank; and what takes a clock, or a while, the
first rank does for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from frostline.distributed.exchange import exchange
from frostline.errors import FrostlineError

__all__ = ["Agreement", "from_first"]

T = TypeVar("T")


class Agreement:
    """Hands the first rank's statistics to all: one small broadcast for each decision.

    Args:
        group: of the ranks that train together.
        device: on which that group talks.
        blocks: how many blocks there are.
        layers: dotted paths of the parameters that a policy may let rest.
    """

    def __init__(self, group: Any, device: torch.device, blocks: int, layers: Sequence[str]) -> None:
        self._group, self._device = group, device
        # The layout is the same on every rank, whatever a rank has measured.
        self._keys: list[tuple[str, Any]] = [("interval_steps", None)]
        self._keys += [("scores", None), *(("scores", block) for block in range(blocks))]
        self._keys += [("changes", None), *(("changes", path) for path in layers)]

    def on(self, observed: Mapping[str, Any], step: int) -> dict[str, Any]:
        """What the first rank observed; every rank calls this at the same step.

        Args:
            observed: ``interval_steps``, and ``scores`` and ``changes``, each a mapping or ``None``.
            step: optimizer steps so far.

        Raises:
            RankError: another rank hangs, or has ended.
        """
        numbers = [self._number(observed, name, key) for name, key in self._keys]
        table = torch.tensor(
            [[0.0 if number is None else number for number in numbers], [number is not None for number in numbers]],
            dtype=torch.float64,
            device=self._device,
        )
        with exchange(f"to agree on what freezes after step {step}"):
            dist.broadcast(table, src=dist.get_global_rank(self._group, 0), group=self._group)
            rows = table.tolist()  # a GPU waits here
        agreed: dict[str, Any] = {"scores": None, "changes": None}
        for (name, key), number, there in zip(self._keys, *rows, strict=True):
            if not there:
                continue
            if name == "interval_steps":
                agreed[name] = int(number)
            elif key is None:
                agreed[name] = {}
            else:
                agreed[name][key] = number
        return agreed

    @staticmethod
    def _number(observed: Mapping[str, Any], name: str, key: Any) -> float | None:
        """One cell: a number, 0 for the bare presence of a mapping, ``None`` for what was not measured."""
        value = observed[name]
        found: float | None = value
        if value is not None and name != "interval_steps":
            found = 0.0 if key is None else value.get(key)
        return found


def from_first(make: Callable[[], T], device: torch.device | None = None) -> T:
    """What ``make`` gives the first of all ranks, on every rank; the others wait for it and make nothing.

    A process that is alone makes it.

    Args:
        make: gives something that can be pickled.
        device: on which the ranks talk (default: that of their process group).

    Raises:
        FrostlineError: what ``make`` raised, on every rank. An error of another kind is raised as it is on the first
            rank, and told of by the others.
        RankError: the first rank did not come to it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failed, said = error, f"the first rank has failed: {type(error).__name__}: {error}"
            outcome[1] = error if isinstance(error, FrostlineError) else FrostlineError(said)
    with exchange("to hear from the first one"):
        dist.broadcast_object_list(outcome, src=0, device=device)
    if failed is not None:
        raise failed
    found, fault = outcome
    if fault is not None:
        raise fault
    return cast(T, found)
