"""The simulator against the published cluster: fitted to its two iteration times, asked for its two speed-ups.

``published.yaml`` holds the set-up, and says of each number where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from frostline.simulator.cluster import Cluster, Input, Profile
from frostline.simulator.files import load, validated
from frostline.simulator.model import simulate
from frostline.simulator.trajectory import Course, Trajectory

__all__ = ["Check", "Claim", "Setup", "check", "setup"]

_FILE = Path(__file__).with_name("published.yaml")


class Iterations(Input):
    """Seconds of an iteration on one rank, and on all: the two figures that are fitted to."""

    one: float = Field(gt=0.0)
    all: float = Field(gt=0.0)


class Published(Input):
    """How many times faster (performance packing), cheaper (efficiency packing), and faster on one GPU."""

    time: float
    cost: float
    one_gpu: float


class Alternative(Input):
    """Another assumption: ``change`` is laid over the set-up."""

    what: str
    change: dict[str, Any]


class Setup(Input):
    """``published.yaml``."""

    profile: Profile
    cluster: Cluster
    trajectory: Trajectory
    batch: int
    ranks: int
    cache: bool
    iteration_seconds: Iterations
    published: Published
    alternatives: list[Alternative]

    @property
    def course(self) -> Course:
        return self.trajectory.course()


@dataclass(frozen=True)
class Claim:
    """A published figure beside the one predicted."""

    what: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """Relative to the published figure; above 0 where too much is predicted."""
        return self.predicted / self.published - 1.0


@dataclass(frozen=True)
class Check:
    """A fitted set-up and what it predicts.

    ``unit_seconds`` is the forward pass of a block for one sample, ``bytes_per_second`` the ring's effective bandwidth:
    the two parameters that were fitted.
    """

    setup: Setup
    profile: Profile
    cluster: Cluster
    unit_seconds: float
    bytes_per_second: float
    claims: tuple[Claim, ...]

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        fitted = {"block_forward_seconds": self.unit_seconds, "bytes_per_second": self.bytes_per_second}
        claims = [{**vars(claim), "error": claim.error} for claim in self.claims]
        return {"iteration_seconds": dict(self.setup.iteration_seconds), "fitted": fitted, "claims": claims}


def setup(change: Mapping[str, Any] | None = None) -> Setup:
    """The published set-up, with ``change`` laid over it."""
    return validated(Setup, _laid_over(load(_FILE, "set-up"), change or {}), "the published set-up")


def _laid_over(content: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in change.items():
        merged[key] = _laid_over(merged[key], value) if isinstance(value, Mapping) else value
    return merged


def check(given: Setup) -> Check:
    """Fit, then predict.

    The fit has as many unknowns as figures, so it is exact. One rank sends nothing, so its iteration is computing
    alone: unit = t_one / (batch * (forward + backward units)). The rest of an iteration on all n ranks is what of the
    all-reduce the backward pass does not hide: sending = t_all - t_one + overlap * backward, and from the ring's
    formula bandwidth = 2(n - 1)/n * bytes / (sending - 2(n - 1) * latency).
    """
    parts, times, ranks = given.profile.parts, given.iteration_seconds, given.ranks
    forward, backward = sum(part.forward_seconds for part in parts), sum(part.backward for part in parts)
    unit = times.one / (given.batch * (forward + backward))
    link, sent = given.cluster.between, sum(part.parameter_bytes for part in parts)
    sending = times.all - times.one + given.cluster.overlap * given.batch * backward * unit
    bandwidth = 2 * (ranks - 1) / ranks * sent / (sending - 2 * (ranks - 1) * link.latency_seconds)
    profile = _in_seconds(given.profile, unit)
    cluster = given.cluster.model_copy(update={"between": link.model_copy(update={"bytes_per_second": bandwidth})})
    return Check(given, profile, cluster, unit, bandwidth, _claims(given, profile, cluster))


def _in_seconds(profile: Profile, unit: float) -> Profile:
    """Times of a profile that are in units of ``unit`` seconds, in seconds."""

    def scaled(part: Any) -> Any:
        return part.model_copy(
            update={"forward_seconds": part.forward_seconds * unit, "backward_seconds": part.backward * unit}
        )

    return profile.model_copy(
        update={
            "stem": scaled(profile.stem),
            "blocks": [scaled(block) for block in profile.blocks],
            "head": scaled(profile.head),
        }
    )


def _claims(given: Setup, profile: Profile, cluster: Cluster) -> tuple[Claim, ...]:
    def run(packing: str, ranks: int, *, frozen: bool = True) -> tuple[float, float]:
        course = given.course if frozen else given.course.unfrozen()
        found = simulate(
            profile, cluster, course, ranks=ranks, batch=given.batch, packing=packing, cache=given.cache and frozen
        )
        return found.seconds, found.cost

    full, alone, published = run("none", given.ranks, frozen=False), run("none", 1, frozen=False), given.published
    return (
        Claim(
            f"{given.ranks} ranks, time, performance packing",
            full[0] / run("performance", given.ranks)[0],
            published.time,
        ),
        Claim(
            f"{given.ranks} ranks, cost, efficiency packing",
            full[1] / run("efficiency", given.ranks)[1],
            published.cost,
        ),
        Claim("1 rank, time, freezing alone", alone[0] / run("none", 1)[0], published.one_gpu),
    )
