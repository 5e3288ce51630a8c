"""What a run would take on a cluster that is not there: pure functions from a profile, a trajectory and a cluster.

docs/simulator.md derives the formulas, names what they leave out, and checks them against a published run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from frostline.errors import ConfigError, choices_message
from frostline.simulator.cluster import Cluster, Link, Profile
from frostline.simulator.trajectory import Course, Stretch

__all__ = [
    "PACKINGS",
    "SIDES",
    "Simulation",
    "Stage",
    "StepTime",
    "all_reduce_seconds",
    "compare_packings",
    "largest_batch",
    "memory_bytes",
    "placement",
    "simulate",
    "step_time",
]

PACKINGS = ("none", "performance", "efficiency")
"""What to do with the memory that freezing frees: nothing; larger micro-batches on all ranks; fewer ranks."""

SIDES = ("full", *PACKINGS)
"""What is compared: nothing frozen, and freezing with each packing."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    ``fixed`` does not depend on its size; ``waiting`` is the part of the all-reduce that the backward pass does not
    hide.
    """

    fixed: float
    forward: float
    backward: float
    waiting: float

    @property
    def total(self) -> float:
        return self.fixed + self.forward + self.backward + self.waiting


@dataclass(frozen=True)
class Stage:
    """A stretch of the run with one depth, micro-batch and number of ranks.

    ``start`` samples were seen before it. ``seconds`` holds its ``steps`` and the ``restart`` that began it.
    """

    start: int
    samples: int
    depth: int
    batch: int
    ranks: int
    steps: int
    seconds: float
    restart: float

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step."""
        return (self.seconds - self.restart) / self.steps


@dataclass(frozen=True)
class Simulation:
    """A simulated run. ``cost`` is in the units of the cluster's price; a rank costs while it is part of a stage."""

    packing: str
    stages: tuple[Stage, ...]
    epoch_seconds: tuple[float, ...]
    price_per_rank_hour: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def rank_hours(self) -> float:
        return sum(stage.ranks * stage.seconds for stage in self.stages) / 3600

    @property
    def cost(self) -> float:
        return self.rank_hours * self.price_per_rank_hour

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        stages = [{**asdict(stage), "step_seconds": stage.step_seconds} for stage in self.stages]
        totals = {"seconds": self.seconds, "steps": self.steps, "cost": self.cost}
        return {"packing": self.packing, **totals, "epoch_seconds": list(self.epoch_seconds), "stages": stages}


def all_reduce_seconds(cluster: Cluster, nbytes: float, ranks: int) -> float:
    """Seconds until ``ranks`` ranks have the sum of ``nbytes`` bytes of each.

    A ring of n members takes 2(n - 1) messages of nbytes / n each, one after the other:
    2(n - 1)/n * nbytes / bandwidth + 2(n - 1) * latency. With several ranks to a host there is a ring inside each host,
    and one between hosts: each rank takes its share of the bytes to the other hosts, all over the one link of its host,
    which therefore carries ``nbytes`` as if one rank sent them.
    """
    inside = min(ranks, cluster.ranks_per_host)
    between = _ring(cluster.between, nbytes, math.ceil(ranks / cluster.ranks_per_host))
    return between if cluster.inside is None else between + _ring(cluster.inside, nbytes, inside)


def _ring(link: Link, nbytes: float, members: int) -> float:
    return 2 * (members - 1) * (nbytes / members / link.bytes_per_second + link.latency_seconds)


def step_time(
    profile: Profile, cluster: Cluster, *, depth: int, batch: int, ranks: int, skipped: float = 0.0
) -> StepTime:
    """One step with ``batch`` samples on each of ``ranks`` ranks.

    The whole model runs forward, less ``skipped`` seconds a sample that a cache saves; what lies above the frost line
    runs backward, is updated and sends its gradients. With N equal blocks that is (3N - 2k) blocks' forward passes at
    depth k.
    """
    above = profile.above(depth)
    forward = batch * (sum(part.forward_seconds for part in profile.parts) - skipped)
    backward = batch * sum(part.backward for part in above)
    fixed = profile.step_seconds + sum(part.update_seconds for part in above)
    sending = all_reduce_seconds(cluster, sum(part.parameter_bytes for part in above), ranks)
    return StepTime(fixed, forward, backward, max(0.0, sending - cluster.overlap * backward))


def memory_bytes(profile: Profile, depth: int, batch: int) -> float:
    """M(batch, depth): weights, gradients and optimizer state of what trains, and what ``batch`` samples take.

    This is :class:`frostline.memory.MemoryModel` where gradients stay for the whole step, as in DDP's buckets.
    """
    return _fixed_bytes(profile, depth) + batch * _sample_bytes(profile, depth)


def _fixed_bytes(profile: Profile, depth: int) -> float:
    trains = sum(part.parameter_bytes for part in profile.above(depth))
    return sum(part.parameter_bytes for part in profile.parts) + trains * (1 + profile.optimizer_state)


def _sample_bytes(profile: Profile, depth: int) -> int:
    return profile.sample_bytes + sum(part.activation_bytes for part in profile.above(depth))


def largest_batch(profile: Profile, cluster: Cluster, depth: int) -> int:
    """The most samples of a micro-batch that a device holds at ``depth``; 0 where not even one fits."""
    free, each = cluster.device_memory - _fixed_bytes(profile, depth), _sample_bytes(profile, depth)
    if free < 0:
        return 0
    return int(free // each) if each else sys.maxsize


def placement(
    profile: Profile, cluster: Cluster, packing: str, *, depth: int, batch: int, ranks: int, samples_per_epoch: int
) -> tuple[int, int]:
    """Micro-batch and ranks at ``depth`` of a run that began with ``batch`` and ``ranks``.

    ``performance`` keeps the ranks and takes the largest micro-batch that fits (an epoch in one step at most).
    ``efficiency`` keeps the global batch: it halves the ranks and doubles the micro-batch while that fits and the
    ranks are even. Neither touches a run at depth 0: memory that freezing has not freed is the user's choice.
    """
    if packing == "none" or not depth:
        return batch, ranks
    most = largest_batch(profile, cluster, depth)
    if packing == "performance":
        return max(batch, min(most, math.ceil(samples_per_epoch / ranks))), ranks
    while ranks % 2 == 0 and 2 * batch <= most:
        batch, ranks = 2 * batch, ranks // 2
    return batch, ranks


def simulate(
    profile: Profile,
    cluster: Cluster,
    course: Course,
    *,
    ranks: int,
    batch: int,
    packing: str = "none",
    cache: bool = False,
) -> Simulation:
    """Simulate a whole run.

    A step crosses neither an epoch's end nor a move of the frost line, so the last one before either may be smaller.
    Where several ranks train each change of stage costs ``cluster.restart_seconds``, a move without packing too: only
    a wrapper that is made anew sends fewer gradients.

    Args:
        ranks: at the start.
        batch: samples of a rank's micro-batch at the start; a step has ``ranks * batch``.
        packing: one of :data:`PACKINGS`.
        cache: a sample's prefix is computed once, and its record read for nothing from the next epoch on; before the
            first one is read at a depth, a batch is run in several ways and compared.

    Raises:
        ConfigError: an unknown packing, a depth that freezes all blocks, or a micro-batch that does not fit.
    """
    stretches = course.stretches()
    _check(profile, cluster, stretches, ranks, batch, packing)
    stages: list[Stage] = []
    checked: set[int] = set()
    epochs = [0.0] * (stretches[-1].epoch + 1)
    for number, stretch in enumerate(stretches):
        rows, members = placement(
            profile, cluster, packing,
            depth=stretch.depth, batch=batch, ranks=ranks, samples_per_epoch=course.samples_per_epoch,
        )  # fmt: skip
        skipped = _skipped(profile, stretches, number) if cache else 0.0
        steps, seconds = _steps(profile, cluster, stretch, rows, members, skipped)
        if skipped and stretch.depth not in checked:
            checked.add(stretch.depth)
            seconds += rows * _check_seconds(profile, stretch.depth)
        last = stages[-1] if stages else None
        restart = 0.0
        if last is not None and (last.depth, last.batch, last.ranks) == (stretch.depth, rows, members):
            stages[-1] = replace(
                last, samples=last.samples + stretch.samples, steps=last.steps + steps, seconds=last.seconds + seconds
            )
        else:
            if last is not None and max(last.ranks, members) > 1:
                restart = cluster.restart_seconds
            stages.append(
                Stage(stretch.start, stretch.samples, stretch.depth, rows, members, steps, restart + seconds, restart)
            )
        epochs[stretch.epoch] += restart + seconds
    return Simulation(packing, tuple(stages), tuple(epochs), cluster.price_per_rank_hour)


def compare_packings(
    profile: Profile, cluster: Cluster, course: Course, *, ranks: Iterable[int], batch: int, cache: bool = False
) -> dict[int, dict[str, Simulation]]:
    """For each number of ranks: the run with nothing frozen (``full``), and the trajectory with each packing."""
    found = {}
    for count in ranks:
        full = simulate(profile, cluster, course.unfrozen(), ranks=count, batch=batch)
        frozen = {
            packing: simulate(profile, cluster, course, ranks=count, batch=batch, packing=packing, cache=cache)
            for packing in PACKINGS
        }
        found[count] = {"full": full, **frozen}
    return found


def _steps(
    profile: Profile, cluster: Cluster, stretch: Stretch, batch: int, ranks: int, skipped: float
) -> tuple[int, float]:
    """How many steps a stretch takes, and how long."""
    whole, rest = divmod(stretch.samples, batch * ranks)
    sizes = [(whole, batch), (1, math.ceil(rest / ranks))] if rest else [(whole, batch)]
    seconds = [
        count * step_time(profile, cluster, depth=stretch.depth, batch=rows, ranks=ranks, skipped=skipped).total
        for count, rows in sizes
    ]
    return whole + (rest > 0), sum(seconds)


def _check_seconds(profile: Profile, depth: int) -> float:
    """Seconds a sample of what the cache compares before it reads the first record at ``depth``.

    The gates (:mod:`frostline.cache.gates`) run one batch: the prefix twice for itself and twice as trained, the whole
    model twice, and what is above the line twice.
    """
    prefix, above = (
        sum(part.forward_seconds for part in parts) for parts in (profile.below(depth), profile.above(depth))
    )
    return 6 * prefix + 4 * above


def _skipped(profile: Profile, stretches: Sequence[Stretch], number: int) -> float:
    """Forward seconds that records save a sample of a stretch, on average.

    Samples come once an epoch, in any order: a record is as deep as the line was when the epoch before brought the
    sample, and of no use if the line has been above that depth since (what it stands on has trained).
    """
    epoch = stretches[number].epoch
    total = saved = 0.0
    for i, before in enumerate(stretches[:number]):
        if before.epoch == epoch - 1:
            total += before.samples
            if before.depth <= min(stretch.depth for stretch in stretches[i : number + 1]):
                saved += before.samples * sum(part.forward_seconds for part in profile.below(before.depth))
    return saved / total if total else 0.0


def _check(
    profile: Profile, cluster: Cluster, stretches: Sequence[Stretch], ranks: int, batch: int, packing: str
) -> None:
    if packing not in PACKINGS:
        raise ConfigError(choices_message("packing", packing, PACKINGS))
    for name, value in (("ranks", ranks), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    depths = [stretch.depth for stretch in stretches]
    if max(depths) >= profile.size:
        raise ConfigError(
            f"depth={max(depths)} freezes all {profile.size} blocks of the profile; at least one must stay active "
            f"(valid depths: 0..{profile.size - 1})"
        )
    most = largest_batch(profile, cluster, min(depths))
    if batch > most:
        needed, there = memory_bytes(profile, min(depths), batch) / 2**30, cluster.device_memory / 2**30
        raise ConfigError(
            f"batch={batch}: at depth {min(depths)} that takes {needed:.2f} GiB of a device's {there:.2f} GiB; "
            + (f"at most {most} fit" if most else "not even one sample fits")
        )
