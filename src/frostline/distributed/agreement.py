"""How ranks come to the same decision: they decide on the same numbers.

Gradients are reduced before they are measured, so every rank measures the same, and a mean of scores is never taken.
But kernels of unlike devices round differently, and of two blocks that are nearly equal each rank could freeze
another one. So a policy is shown what the first rank measured, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from frostline.distributed.exchange import exchange

__all__ = ["Agreement"]


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
