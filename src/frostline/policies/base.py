"""What a policy is: numbers in, decision out.

A policy touches no module. It says how often it wants to be asked (:meth:`Policy.cadence`), what it
needs measured (:attr:`Policy.needs`), takes an :class:`Observation` and returns a :class:`Decision`.
Because both are plain numbers, a recorded run can be replayed through any policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from frostline.errors import ConfigError

__all__ = [
    "Cadence",
    "Decision",
    "Explained",
    "Moments",
    "Observation",
    "Plan",
    "Policy",
    "PolicyOptions",
    "checked_depth",
]

Moments = Literal["keep", "drop", "host"]
"""What becomes of the optimizer state of layers while they rest."""


@dataclass(frozen=True)
class Decision:
    """All that any policy can say.

    ``depth`` is the number of leading blocks frozen, ``0..N-1``; the stem freezes with block 0.
    ``resting`` names modules and parameters above the frost line (dotted paths in the model) that do not
    train for now; gradients pass through them.
    """

    depth: int = 0
    resting: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What is known of the run before it starts.

    ``block_paths`` are the dotted paths of the blocks, ``stem_paths`` and ``head_paths`` those of the
    modules outside them that own parameters. ``layer_paths`` are those of the parameters that a policy may
    let rest one by one (weights of any kind), ``bias_paths`` those of biases; both in the whole model.
    ``layer_depths`` says of each of ``layer_paths`` from which depth on it is frozen (0: never, it is in the head).
    ``samples_per_step`` counts all ranks and micro-batches.
    """

    block_paths: tuple[str, ...]
    stem_paths: tuple[str, ...]
    head_paths: tuple[str, ...]
    samples_per_step: int
    samples_per_epoch: int
    epochs: float
    layer_paths: tuple[str, ...] = ()
    bias_paths: tuple[str, ...] = ()
    layer_depths: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        return len(self.block_paths)

    @property
    def total_samples(self) -> float:
        return self.samples_per_epoch * self.epochs

    def numbers(self) -> dict[str, Any]:
        """The JSON form that goes into the event log."""
        return asdict(self)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Plan:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
        return cls(**values)


@dataclass(frozen=True)
class Observation:
    """The numbers a policy sees at one evaluation.

    ``scores`` is the statistic that the policy asked for, per active block (``gradient_sum``: the L1
    norm of the vector sum of that block's gradients over the interval); ``None`` where it asked for none.
    ``changes`` (``weight_change``) is how far the last optimizer step moved each layer that had a gradient, relative
    to its weights; ``None`` where the step was skipped. ``learning_rate`` is that of the last optimizer step, the
    largest of the optimizer's groups; ``None`` where no optimizer knows it.
    ``interval_steps`` is the number of optimizer steps that the statistic covers.
    """

    step: int
    samples: int
    progress: float
    depth: int
    blocks: int
    scores: Mapping[int, float] | None = None
    interval_steps: int = 0
    changes: Mapping[str, float] | None = None
    learning_rate: float | None = None

    def numbers(self) -> dict[str, Any]:
        out = asdict(self)
        if self.scores is not None:
            out["scores"] = {str(k): float(v) for k, v in self.scores.items()}
        return out

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Observation:
        values = dict(numbers)
        if values.get("scores") is not None:
            values["scores"] = {int(k): float(v) for k, v in values["scores"].items()}
        return cls(**values)


@dataclass(frozen=True)
class Cadence:
    """Ask the policy every ``every`` samples (or optimizer steps), at the first step that reaches it."""

    every: float
    unit: Literal["samples", "steps"] = "samples"

    def times(self, *, step: int, samples: int) -> int:
        """How many times a policy is to have been asked after this step."""
        return int(((samples if self.unit == "samples" else step) + 1e-6) / self.every)

    @property
    def restless(self) -> bool:
        """Whether the policy is asked after every optimizer step."""
        return self.unit == "steps" and self.every <= 1


class PolicyOptions(BaseModel):
    """Options of a policy: unknown names and values out of range are errors that list the valid ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def undecided(self) -> str | None:
        """The option that is left to a memory budget to choose, if there is one."""
        return None

    def choices(self, *, pages: bool) -> Sequence[dict[str, Any]]:
        """What a memory budget may change in these options, what changes the training least first.

        Args:
            pages: whether there is a host's memory beside the device's, to which something could be moved.
        """
        return ({},)


OptionsT = TypeVar("OptionsT", bound=PolicyOptions)


@dataclass
class Explained:
    """The numbers behind a decision, for the event log and the report."""

    reason: str
    changes: dict[int, float] = field(default_factory=dict)
    threshold: float | None = None

    def numbers(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "changes": {str(k): float(v) for k, v in self.changes.items()},
            "threshold": self.threshold,
        }


def checked_depth(depth: int, plan: Plan, given: str) -> int:
    """``depth``, if it leaves a block of ``plan`` active.

    Raises:
        ConfigError: it does not; ``given`` says where it comes from.
    """
    if depth >= plan.blocks:
        raise ConfigError(
            f"{given}: that freezes all {plan.blocks} blocks; at least one must stay active "
            f"(valid depths: 0..{plan.blocks - 1})"
        )
    return depth


class Policy(Generic[OptionsT]):
    """Base of all policies. A subclass sets ``name``, ``summary`` and ``Options`` and writes :meth:`decide`.

    ``needs`` names the statistics to measure: ``gradient_sum``, ``weight_change``. ``log_every``: which
    decisions go into the event log, besides those that move the frost line (1: all).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[PolicyOptions]] = PolicyOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    log_every: ClassVar[int] = 1

    def __init__(self, options: OptionsT, plan: Plan) -> None:
        self.options = options
        self.plan = plan

    def replan(self, plan: Plan, decision: Decision) -> Decision:
        """Go on with ``plan``, since the model has turned out to be other than it looked; what holds from here on."""
        self.plan = plan
        return decision

    @property
    def moments(self) -> Moments:
        """What becomes of the optimizer state of resting layers; below the frost line it is always dropped."""
        return "keep"

    def cadence(self) -> Cadence | None:
        """How often :meth:`decide` is asked; ``None``: only :meth:`start` is."""
        return None

    def start(self) -> Decision:
        """The decision that holds from the first step."""
        return Decision()

    def heaviest(self, sizes: Mapping[str, int]) -> Decision:
        """The decision that takes the most memory of all that may come.

        Args:
            sizes: bytes that each of ``plan.layer_paths`` takes when it trains, beyond what it takes when it rests.
        """
        return self.start()

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        """Take the numbers of one interval and say what to freeze, and why."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
