"""Policy ``random-blocks``: LISA (Pan et al. 2024). A few random blocks train, the others rest.

Every ``every`` optimizer steps ``active`` blocks are drawn uniformly. The draw depends on the seed and on the
number of the draw only, so that all ranks, and a resumed run, draw the same (the published callback draws from
an unseeded generator on each rank).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field

from frostline.errors import ConfigError
from frostline.policies.base import Cadence, Decision, Explained, Observation, Plan, Policy, PolicyOptions

__all__ = ["RandomBlocks", "RandomBlocksOptions"]


class RandomBlocksOptions(PolicyOptions):
    """``active`` blocks train at a time, drawn every ``every`` steps; stem and head train unless switched off."""

    active: int = Field(default=2, ge=1)
    every: int = Field(default=20, ge=1)
    stem: bool = True
    head: bool = True
    seed: int = 0


class RandomBlocks(Policy[RandomBlocksOptions]):
    """Rests all blocks but a random few; the frost line itself stays at 0."""

    name = "random-blocks"
    summary = "LISA: n random blocks train for s steps, the others rest"
    Options = RandomBlocksOptions

    def __init__(self, options: RandomBlocksOptions, plan: Plan) -> None:
        super().__init__(options, plan)
        if options.active > plan.blocks:
            raise ConfigError(f"policy 'random-blocks', active={options.active}: the model has {plan.blocks} blocks")
        self.draws = 0

    def cadence(self) -> Cadence:
        return Cadence(self.options.every, "steps")

    def start(self) -> Decision:
        return self._draw()[0]

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        decision, chosen = self._draw()
        return decision, Explained(f"draw {self.draws}: blocks {', '.join(map(str, chosen))} train")

    def heaviest(self, sizes: Mapping[str, int]) -> Decision:
        """The lowest blocks train: all above keep what the way down to them needs."""
        return self._training(range(self.options.active))

    def _draw(self) -> tuple[Decision, list[int]]:
        self.draws += 1
        generator = random.Random(f"{self.options.seed}:{self.draws}")
        chosen = sorted(generator.sample(range(self.plan.blocks), self.options.active))
        return self._training(chosen), chosen

    def _training(self, chosen: Collection[int]) -> Decision:
        resting = {path for i, path in enumerate(self.plan.block_paths) if i not in chosen}
        if not self.options.stem:
            resting.update(self.plan.stem_paths)
        if not self.options.head:
            resting.update(self.plan.head_paths)
        return Decision(0, frozenset(resting))

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.draws = int(state["draws"])
