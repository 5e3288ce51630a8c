"""Chooses how a run is to fit into a memory budget: micro-batch, compression level, gradient checkpointing.

What already fits is left alone. Otherwise the memory model says for each way to run a step how large a micro-batch
fits, which a step of that size confirms; the candidates are timed as they would run, and the fastest a sample is
taken; of two that are as fast, the more exact one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from frostline.distributed import Buckets
from frostline.errors import ConfigError
from frostline.memory.model import PROBE_ROWS, Bench, MemoryModel, OptimizerCost, Way

__all__ = ["TELLS_APART", "BudgetError", "MemoryPlan", "candidates", "plan_memory"]

# From more to less exact.
_LADDER = ("safe", "slimfit", "max")
# A way must be this much faster than a more exact one.
TELLS_APART = 0.95


class BudgetError(ConfigError):
    """A budget that nothing meets."""


@dataclass(frozen=True)
class Considered:
    """One way that fits: its largest micro-batch, bytes at the peak, seconds a sample."""

    level: str
    checkpointing: bool
    rows: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits into ``budget`` bytes.

    Attributes:
        rows: samples in a micro-batch; ``steps`` of them make what was one batch.
        level: of compression.
        checkpointing: whether blocks are checkpointed.
        peak: bytes at the peak of a step.
        plain: bytes of the run as it was; ``None``: more than the device has.
        considered: every way that fits, with its numbers; none where the run fits as it is.
        policy: options of the policy that the budget has chosen.
        ranks: processes that train together, each with this budget.
    """

    budget: int
    rows: int
    steps: int
    level: str
    checkpointing: bool
    peak: int
    plain: int | None
    considered: tuple[Considered, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1

    @property
    def changes(self) -> bool:
        """Whether anything is to change."""
        return bool(self.considered)

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> MemoryPlan:
        """The plan whose :meth:`numbers` these are."""
        return cls(**{**numbers, "considered": tuple(Considered(**one) for one in numbers["considered"])})

    def __str__(self) -> str:
        chosen = "".join(f", {name}={value}" for name, value in self.policy.items())
        if not self.changes:
            how = f"with {chosen[2:]}" if chosen else "as it is"
            return f"{_readable(self.peak)} at the peak: within the budget of {_readable(self.budget)} {how}"
        way = Way(self.level, self.checkpointing)
        plain = _readable(self.plain) if self.plain is not None else "more than the device has"
        return (
            f"{plain} at the peak would exceed the budget of {_readable(self.budget)}: "
            f"micro-batches of {self.rows} ({self.steps} a step), {way}{chosen}: {_readable(self.peak)}"
        )


def candidates(strongest: str, *, checkpoints: bool) -> list[Way]:
    """The ways that a plan may choose from, more exact ones first.

    Args:
        strongest: name of a level.
        checkpoints: whether the model can checkpoint its blocks.
    """
    # "published" is no step of the ladder: it is taken only where it is asked for.
    levels = ("published",) if strongest == "published" else _LADDER[: (*_LADDER, "off").index(strongest) + 1]
    packed = [Way(level) for level in levels if strongest != "off"]
    return [Way(), *([Way(checkpointing=True)] if checkpoints else []), *packed]


def plan_memory(
    bench: Bench,
    ways: Sequence[Way],
    optimizer: OptimizerCost,
    *,
    budget: int,
    rows: int,
    resting: int = 0,
    held: int = 0,
    buckets: Buckets | None = None,
    accumulates: bool = False,
    splits: bool = True,
) -> MemoryPlan:
    """How a run with batches of ``rows`` samples is to fit into ``budget`` bytes.

    Args:
        bench: runs steps of the model, frozen as it is when the run begins.
        ways: from :func:`candidates`; the first is the run as it is.
        optimizer: what it takes.
        budget: bytes for weights, optimizer's state, gradients and activations together, in each process.
        rows: samples in a micro-batch as the run has it.
        resting: bytes of weights that rest and whose optimizer state is kept on the device.
        held: bytes of whatever else is there from step to step (sums of gradients).
        buckets: of the data-parallel wrapper, with several ranks.
        accumulates: whether the run accumulates gradients over micro-batches already.
        splits: whether smaller micro-batches are the same training (batch normalisation makes it another).

    Raises:
        BudgetError: nothing fits; the message says what the least is.
    """
    model = MemoryModel.measure(bench, (), optimizer, resting, held, buckets)

    def peak(way: Way, size: int) -> float:
        if way not in model.activations and not _measured(bench, model, way, min(PROBE_ROWS, rows)):
            return float("inf")
        return model.peak(way, size, accumulates=accumulates or size < rows)

    def fits(way: Way, size: int) -> bool:
        # The model errs by a few per cent; a step of that size does not.
        return peak(way, size) <= budget and _measured(bench, model, way, size) and peak(way, size) <= budget

    plain = ways[0]
    if fits(plain, rows):
        taken = round(peak(plain, rows))
        return MemoryPlan(budget, rows, 1, plain.level, plain.checkpointing, taken, taken)
    before = peak(plain, rows)
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0] if splits else [rows]
    found = []
    for way in ways:
        size = next((size for size in sizes if fits(way, size)), None)
        if size is not None:
            seconds = bench.seconds(way, size) / size
            found.append(Considered(way.level, way.checkpointing, size, round(peak(way, size)), seconds))
    if found:
        best = _best(found)
        return MemoryPlan(
            budget, best.rows, rows // best.rows, best.level, best.checkpointing, best.peak,
            round(before) if before < float("inf") else None, tuple(found),
        )  # fmt: skip
    least = min(peak(way, sizes[-1]) for way in ways)
    # Blocks that are checkpointed already are not compressed.
    strongest = plain.checkpointing or any(way.level == _LADDER[-1] for way in ways)
    raise BudgetError(
        f"memory.budget={_readable(budget)} cannot be met: a step takes at least {_readable(least)}, in micro-batches "
        f"of {sizes[-1]} ({_readable(model.weights)} of it weights); choose a larger budget, "
        f"{'' if strongest else 'a stronger level, '}or a policy that freezes more"
    )


def _measured(bench: Bench, model: MemoryModel, way: Way, rows: int) -> bool:
    """Tell ``model`` what ``way`` takes with ``rows`` samples; false where the device has not that much."""
    try:
        model.activations[way] = model.calibrated(bench, way, rows)
    except torch.OutOfMemoryError:
        return False
    return True


def _best(found: Sequence[Considered]) -> Considered:
    """The fastest; one that is less exact has to be clearly faster."""
    best = found[0]
    for other in found[1:]:
        if other.seconds < TELLS_APART * best.seconds:
            best = other
    return best


def _readable(nbytes: float) -> str:
    if nbytes == float("inf"):
        return "more than the device has"
    size, units = nbytes, ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 999.5 and len(units) > 1:  # from there on three digits are not enough
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:.0f} {units[0]}"
