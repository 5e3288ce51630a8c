"""What the engine tells of a run while it trains: its start, decisions, moves of the line, limits, the cache.

The schema is in ``docs/architecture.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from frostline.clock import Clock
from frostline.events import EventLog, environment
from frostline.policies.base import Decision, Explained, Observation, Plan

__all__ = ["Journal"]

logger = logging.getLogger("frostline")


class Journal:
    """Writes to ``log`` where ``clock`` stands, and keeps what a summary needs.

    Attributes:
        limits: what could not be done for this model, each once.
        trajectory: every move of the frost line: ``{step, samples, depth}``.
    """

    def __init__(self, log: EventLog, clock: Clock) -> None:
        self.log = log
        self._clock = clock
        self.limits: list[str] = []
        self.trajectory: list[dict[str, int]] = []

    def write(self, event: str, **fields: Any) -> None:
        """Log ``event`` at this step."""
        self.log.append(event, step=self._clock.step, samples=self._clock.samples, **fields)

    def begin(self, policy: Mapping[str, Any], model: str, stack: str, plan: Plan) -> None:
        """A run begins."""
        self.write(
            "run",
            policy=dict(policy),
            model=model,
            stack=stack,
            blocks=plan.blocks,
            plan=plan.numbers(),
            environment=environment(),
        )

    def limit(self, code: str, message: str) -> None:
        """What cannot be done for this model, once (law 8)."""
        if message not in self.limits:
            self.limits.append(message)
            logger.warning("%s", message)
            self.write("limit", code=code, message=message)

    def cache(self, action: str, **numbers: Any) -> None:
        """What the cache measured or did."""
        self.write("cache", action=action, **numbers)

    def moved(self, depth: int) -> None:
        """The frost line moved."""
        self.trajectory.append({"step": self._clock.step, "samples": self._clock.samples, "depth": depth})

    def decided(
        self, evaluation: int, seen: Observation, why: Explained, before: int, decision: Decision, *, applied: bool
    ) -> None:
        """A decision, with the numbers behind it."""
        self.write(
            "decision",
            evaluation=evaluation,
            observation=seen.numbers(),
            explanation=why.numbers(),
            depth_before=before,
            depth=decision.depth,
            resting=sorted(decision.resting),
            applied=applied,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"trajectory": self.trajectory, "limits": self.limits, "events_offset": self.log.offset()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; what was logged after it is forgotten, since it comes again."""
        self.trajectory, self.limits = list(state["trajectory"]), list(state["limits"])
        self.log.rewind(state["events_offset"])
