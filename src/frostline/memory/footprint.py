"""What a training pass keeps for its backward pass: bytes by part of the model and by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frostline.memory.compressor import compressing
from frostline.memory.operations import Role
from frostline.trace import Call

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes that one pass keeps: storages counted once, parameters and buffers not at all.

    Attributes:
        level: name of the level at which they were counted.
        parts: of the stem, each block and the head: operation -> bytes. What runs between two blocks counts for the
            block before it; a storage counts for the first operation that keeps it.
    """

    level: str
    parts: list[dict[str, int]]

    @property
    def total(self) -> int:
        return sum(self.by_part())

    def by_part(self) -> list[int]:
        """Bytes of the stem, each block and the head."""
        return [sum(part.values()) for part in self.parts]

    def by_operation(self) -> dict[str, int]:
        """Bytes of each operation in the whole model, largest first."""
        sums: Counter[str] = Counter()
        for part in self.parts:
            sums.update(part)
        return dict(sums.most_common())


def footprint(model: nn.Module, blocks: Sequence[nn.Module], call: Call, level: str = "off") -> Footprint:
    """Run one training pass of ``model`` and count what it keeps at ``level``.

    The model is taken as it is: whether it is in train mode, and which parameters train, is the caller's choice.
    Random state and buffers move as in any pass.

    Args:
        model: what is run.
        blocks: inside of it, in the order in which they run.
        call: positional and keyword arguments of the pass.
        level: name of a level.
    """
    parts: list[Counter[str]] = [Counter() for _ in range(len(blocks) + 2)]
    position = 0

    def enter(index: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal position
            position = index

        return hook

    def note(operation: str, role: Role, nbytes: int) -> None:
        parts[position][operation] += nbytes

    handles = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks, start=1)]
    handles.append(blocks[-1].register_forward_hook(enter(len(blocks) + 1)))
    try:
        with torch.enable_grad(), compressing(model, level, note):
            # Its graph lives until all is counted, so that no storage is taken for another.
            output = model(*call[0], **call[1])
        del output
    finally:
        for handle in handles:
            handle.remove()
    return Footprint(level, [dict(part) for part in parts])
