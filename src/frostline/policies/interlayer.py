"""Policy ``interlayer``: SlimFit's inter-layer scheduling (arXiv 2305.18513; algorithms.md 3.2).

At every optimizer step most layers rest. A *layer* here is one tensor of weights: a matrix, an embedding table, the
weight of a normalisation. Each is known by how far its last update moved it. Of those of a kind the ``share`` that
moved least rests, the others train, and only what trained is measured again. A resting layer keeps its old distance, so
it comes back as soon as those that train have fallen below it. What was never trained outranks everything: each layer
is visited once first, in seeded random order.

SlimFit ranks all layers of the model against each other (``within: model``). But Adam moves all weights by about the
learning rate, so that distances are in effect sizes of weights: half at rest are, in an EfficientNet, the 48
normalisations and hardly one of the 48 convolutions, which saves nothing; in BERT the normalisations, the word
embeddings, and a third of the matrices (docs/evidence.md). Here like is ranked with like, unless asked otherwise: a
kind is what stands at the same place in each block; the head, where it is scheduled, is one kind. What stands outside
of these (an embedding table) is its own kind, and trains at every step.

Other than in the released code the distance is a ratio of norms (zeros divide nothing), an update that was skipped is
no update, and the head is not scheduled unless asked for. And the learning rate may rise: a distance counts for what it
would be at today's rate, if that is more than it was. As published, the layers that are visited first would come last
because the rate was still warming up (minilm on trec, AdamW, 25 of 250 steps: some trained a fifth as often). Without a
warm-up nothing is different.

Beyond the paper, a frost line may rise below the layers that take turns (``line``): the blocks under it are frozen,
cost no backward pass and may be cached, and the share that rests is one of the layers above it. Only schedules can set
that line: ``gradient-norm`` compares the gradients of all blocks, and a layer at rest has none.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ValidationError, field_validator

from frostline.errors import ConfigError, choices_message, validation_message
from frostline.policies.base import Cadence, Decision, Explained, Moments, Observation, Plan, Policy, PolicyOptions
from frostline.policies.ramp import Ramp
from frostline.policies.static import Static

__all__ = ["Interlayer", "InterlayerOptions"]

# The kind of what stands in the head. Of what stands in a block it is a path that begins with a dot.
_HEAD = "head"
# What ``auto`` chooses from.
_SHARES = (0.34, 0.5, 0.75, 0.9, 0.95)
_LINES: dict[str, type[Policy[Any]]] = {policy.name: policy for policy in (Static, Ramp)}


class InterlayerOptions(PolicyOptions):
    """``share`` (F) of the layers rests at each step; ``biases`` and ``head`` always train unless switched off.

    ``within``: which layers are ranked together: those of a ``kind``, or all in the ``model``, as published. Of a kind
    as many rest as come nearest to the share (of two layers one at 0.34), but never all.

    Published shares are 0.75 to 0.95, of all layers. Here a third of each kind rests unless another share is given:
    in short trainings larger ones cost more accuracy (README, Measured), and where activations are compressed, resting
    more layers saves few bytes.
    With a memory budget ``share`` may be ``auto``: the least of five shares that can be made to fit.
    ``moments``: optimizer moments of resting layers are kept (as published), dropped, or paged to the host's memory.
    ``line``: a frost line below them, as ``{policy: static, depth: 2}`` or ``{policy: ramp, start: 0.3}``.
    """

    share: float | Literal["auto"] = 0.34
    within: Literal["kind", "model"] = "kind"
    biases: bool = True
    head: bool = True
    moments: Moments = "keep"
    seed: int = 0
    line: dict[str, Any] | None = None

    @property
    def undecided(self) -> str | None:
        return "share" if self.share == "auto" else None

    def choices(self, *, pages: bool) -> Sequence[dict[str, Any]]:
        shares: Sequence[dict[str, Any]] = [{"share": share} for share in _SHARES] if self.undecided else [{}]
        # Paged moments are the same training; who said what is to become of them is obeyed.
        homes: Sequence[dict[str, Any]] = ({},)
        if pages and "moments" not in self.model_fields_set:
            homes = ({}, {"moments": "host"})
        return [{**share, **home} for share in shares for home in homes]

    @field_validator("share", mode="plain")
    @classmethod
    def _is_a_share(cls, value: Any) -> float | Literal["auto"]:
        if value == "auto":
            return "auto"
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = math.nan
        if not 0.0 <= share < 1.0:
            raise ValueError("must be a number from 0 up to, but not, 1; or 'auto' with a memory budget")
        return share

    @field_validator("line")
    @classmethod
    def _is_a_schedule(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            name, options = _name_and_options(value)
            if name not in _LINES:
                raise ValueError(choices_message("policy of a line", name, _LINES))
            kind = _LINES[name].Options
            try:
                kind(**options)
            except ValidationError as error:
                raise ValueError(validation_message(error, f"policy {name!r}", kind.model_fields)) from None
        return value


class Interlayer(Policy[InterlayerOptions]):
    """Rests the layers that move least, chosen anew at every step; the frost line is at 0, or where ``line`` has it."""

    name = "interlayer"
    summary = "SlimFit: at each step the layers that move least rest"
    Options = InterlayerOptions
    needs = frozenset({"weight_change"})
    log_every: ClassVar[int] = 100

    def __init__(self, options: InterlayerOptions, plan: Plan) -> None:
        super().__init__(options, plan)
        assert options.share != "auto", "the registry sees to that"
        self.share = options.share
        self._schedule()
        self.distances: dict[str, float] = {}
        self._rates: dict[str, float] = {}  # the learning rates at which they were measured
        self._rate: float | None = None
        self._active: list[str] = []
        self._line: Policy[Any] | None = None
        self._asked = self._depth = 0
        if options.line is not None:
            name, given = _name_and_options(options.line)
            self._line = _LINES[name](_LINES[name].Options(**given), plan)

    def _schedule(self) -> None:
        """The layers that take turns, and the order in which they do so first."""
        self.layers = [path for path in self.plan.layer_paths if not (self.options.head and self._in_head(path))]
        if not self.layers:
            raise ConfigError("policy 'interlayer': the model has no layers that it could let rest")
        shuffled = random.Random(f"{self.options.seed}").sample(self.layers, len(self.layers))
        self._order = {path: place for place, path in enumerate(shuffled)}
        self._kinds = self._alike()

    def _alike(self) -> dict[str, str]:
        """Of each layer, which others it is ranked with."""
        if self.options.within == "model":
            return dict.fromkeys(self.layers, "")
        places: dict[str, str] = {}
        for path in self.layers:
            block = next((block for block in self.plan.block_paths if path.startswith(f"{block}.")), None)
            outside = _HEAD if self._in_head(path) else path
            places[path] = outside if block is None else path.removeprefix(block)
        many = Counter(places.values())
        # In blocks that have nothing in common all are ranked together: else nothing would ever rest.
        return {path: place if many[place] > 1 or place in (path, _HEAD) else "" for path, place in places.items()}

    def _in_head(self, path: str) -> bool:
        return path.startswith(tuple(f"{head}." for head in self.plan.head_paths))

    def _at_rest(self, layers: int) -> int:
        """How many of so many layers that are ranked together rest."""
        if self.options.within == "model":
            return int(self.share * layers)  # as published
        # Of the few layers of a kind, the nearest number: of two layers above a line, a third would be none.
        return min(layers - 1, int(self.share * layers + 0.5))

    def replan(self, plan: Plan, decision: Decision) -> Decision:
        super().replan(plan, decision)
        self._schedule()
        if self._line is not None:
            self._line.replan(plan, decision)
        return self._next(decision.depth)

    def cadence(self) -> Cadence:
        return Cadence(1, "steps")

    def start(self) -> Decision:
        return self._next(self._line.start().depth if self._line is not None else 0)

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        if seen.changes is not None:
            # Where the engine did not move the line, others trained than were chosen for it.
            trained = self._active if seen.depth == self._depth else [p for p in self.layers if p in seen.changes]
            for path in trained:
                # A layer that is not used (an expert without tokens) counts as visited, and keeps what it had.
                self.distances[path] = seen.changes.get(path, self.distances.get(path, 0.0))
                if path in seen.changes and seen.learning_rate is not None:
                    self._rates[path] = seen.learning_rate
            self._rate = seen.learning_rate
        decision = self._next(self._depth_after(seen))
        above = self._above()
        return decision, Explained(
            f"{len(self._active)} of {len(above)} layers train; "
            f"{sum(path not in self.distances for path in above)} were never trained"
        )

    def heaviest(self, sizes: Mapping[str, int]) -> Decision:
        """Those layers train that take most; the lowest too, down to which the others have to keep what they need."""
        distances, self.distances = self.distances, {path: float(sizes[path]) for path in self.layers}
        rate, self._rate = self._rate, None
        if not self.options.biases:
            self._next(self._line.start().depth if self._line is not None else 0)
            self.distances[self._above()[0]] = math.inf
        decision = self.start()
        self.distances, self._rate = distances, rate
        return decision

    @property
    def moments(self) -> Moments:
        return self.options.moments

    def _depth_after(self, seen: Observation) -> int:
        """Where the line is to be, if it is time to ask; else where it is."""
        every = self._line.cadence() if self._line is not None else None
        times = every.times(step=seen.step, samples=seen.samples) if every is not None else 0
        if self._line is None or times <= self._asked:
            return seen.depth
        self._asked = times
        return self._line.decide(seen)[0].depth

    def _next(self, depth: int) -> Decision:
        self._depth = depth
        alike: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self._above(), key=self._rank):
            alike[self._kinds[path]].append(path)
        resting = {path for ranked in alike.values() for path in ranked[: self._at_rest(len(ranked))]}
        self._active = [path for path in self._above() if path not in resting]
        if not self.options.biases:
            resting.update(self._biases(resting))
        return Decision(depth, frozenset(resting))

    def _above(self) -> list[str]:
        """The layers above the frost line."""
        if not self._depth:
            return self.layers
        depths = dict(zip(self.plan.layer_paths, self.plan.layer_depths, strict=True))
        return [path for path in self.layers if not 0 < depths[path] <= self._depth]

    def _rank(self, path: str) -> tuple[bool, float, int]:
        """What moved least comes first, what was never trained last; the seeded order settles ties."""
        return path not in self.distances, self.distances.get(path, 0.0) * self._risen(path), self._order[path]

    def _risen(self, path: str) -> float:
        """How many times larger the learning rate is than when the layer last trained; at least 1."""
        then = self._rates.get(path)
        return max(1.0, self._rate / then) if then and self._rate is not None else 1.0

    def _biases(self, resting: set[str]) -> set[str]:
        """The biases that stand beside resting weights."""
        owners = {path.rpartition(".")[0] for path in resting}
        return {path for path in self.plan.bias_paths if path.rpartition(".")[0] in owners}

    def state_dict(self) -> dict[str, Any]:
        return {
            "distances": dict(self.distances),
            "rates": dict(self._rates),
            "rate": self._rate,
            "asked": self._asked,
            "depth": self._depth,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.distances = {str(path): float(distance) for path, distance in state["distances"].items()}
        self._rates = {str(path): float(rate) for path, rate in state["rates"].items()}
        self._rate = state["rate"]
        self._asked = int(state["asked"])
        self._next(int(state["depth"]))


def _name_and_options(line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(line.get("policy")), {key: value for key, value in line.items() if key != "policy"}
