"""Policy ``interlayer``: SlimFit's inter-layer scheduling (arXiv 2305.18513; algorithms.md 3.2).

At every optimizer step most layers rest. A *layer* here is one tensor of weights: a matrix, an embedding table, the
weight of a normalisation. Each is known by how far its last update moved it; the ``share`` that moved least rests, the
others train, and only what trained is measured again. A resting layer keeps its old distance, so it comes back as soon
as those that train have fallen below it. What was never trained outranks everything: each layer is visited once first,
in seeded random order.

Other than in the released code the distance is a ratio of norms (zeros divide nothing), an update that was skipped is
no update, and the head is not scheduled unless asked for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from frostline.errors import ConfigError
from frostline.policies.base import Cadence, Decision, Explained, Moments, Observation, Plan, Policy, PolicyOptions

__all__ = ["Interlayer", "InterlayerOptions"]


class InterlayerOptions(PolicyOptions):
    """``share`` (F) of the layers rests at each step; ``biases`` and ``head`` always train unless switched off.

    ``moments``: optimizer moments of resting layers are kept (as published), dropped, or paged to the host's memory.
    """

    share: float = Field(default=0.9, ge=0.0, lt=1.0)
    biases: bool = True
    head: bool = True
    moments: Moments = "keep"
    seed: int = 0


class Interlayer(Policy[InterlayerOptions]):
    """Rests the layers that move least, chosen anew at every step; the frost line itself stays at 0."""

    name = "interlayer"
    summary = "SlimFit: at each step the layers that move least rest"
    Options = InterlayerOptions
    needs = frozenset({"weight_change"})
    log_every: ClassVar[int] = 100

    def __init__(self, options: InterlayerOptions, plan: Plan) -> None:
        super().__init__(options, plan)
        head = tuple(f"{path}." for path in plan.head_paths)
        self.layers = [path for path in plan.layer_paths if not (options.head and path.startswith(head))]
        if not self.layers:
            raise ConfigError("policy 'interlayer': the model has no layers that it could let rest")
        shuffled = random.Random(f"{options.seed}").sample(self.layers, len(self.layers))
        self._order = {path: place for place, path in enumerate(shuffled)}
        self.distances: dict[str, float] = {}
        self._active: list[str] = []

    def cadence(self) -> Cadence:
        return Cadence(1, "steps")

    def start(self) -> Decision:
        return self._next()

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        if seen.changes is not None:
            for path in self._active:
                # A layer that is not used (an expert without tokens) counts as visited, and keeps what it had.
                self.distances[path] = seen.changes.get(path, self.distances.get(path, 0.0))
        decision = self._next()
        return decision, Explained(
            f"{len(self.layers) - self._resting} of {len(self.layers)} layers train; "
            f"{len(self.layers) - len(self.distances)} were never trained"
        )

    @property
    def moments(self) -> Moments:
        return self.options.moments

    @property
    def _resting(self) -> int:
        return int(self.options.share * len(self.layers))

    def _next(self) -> Decision:
        ranked = sorted(self.layers, key=self._rank)
        resting = set(ranked[: self._resting])
        self._active = ranked[self._resting :]
        if not self.options.biases:
            resting.update(self._biases(resting))
        return Decision(0, frozenset(resting))

    def _rank(self, path: str) -> tuple[bool, float, int]:
        """What moved least comes first, what was never trained last; the seeded order settles ties."""
        return path not in self.distances, self.distances.get(path, 0.0), self._order[path]

    def _biases(self, resting: set[str]) -> set[str]:
        """The biases that stand beside resting weights."""
        owners = {path.rpartition(".")[0] for path in resting}
        return {path for path in self.plan.bias_paths if path.rpartition(".")[0] in owners}

    def state_dict(self) -> dict[str, Any]:
        return {"distances": dict(self.distances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.distances = {str(path): float(distance) for path, distance in state["distances"].items()}
        self._next()
