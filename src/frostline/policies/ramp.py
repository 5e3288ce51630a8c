"""Policy ``ramp``: the frozen share grows linearly with training time.

The schedule is the one MosaicML Composer documents for its layer freezing: nothing until ``start`` of the run,
then linearly up to ``level`` of the stack at its end, looked at once an epoch.
"""

from __future__ import annotations

from pydantic import Field

from frostline.policies.base import Cadence, Decision, Explained, Observation, Policy, PolicyOptions

__all__ = ["Ramp", "RampOptions"]


class RampOptions(PolicyOptions):
    """``start``: share of the run before anything freezes; ``level``: share of the stack frozen at the end."""

    start: float = Field(default=0.5, ge=0.0, lt=1.0)
    level: float = Field(default=1.0, ge=0.0, le=1.0)
    evaluations_per_epoch: int = Field(default=1, ge=1)


class Ramp(Policy[RampOptions]):
    """Linear in time; blind to how the training goes."""

    name = "ramp"
    summary = "linear in training time, as MosaicML Composer schedules it"
    Options = RampOptions

    def cadence(self) -> Cadence:
        return Cadence(self.plan.samples_per_epoch / self.options.evaluations_per_epoch)

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        done = max(0.0, seen.progress - self.options.start) / (1.0 - self.options.start)
        share = min(1.0, done) * self.options.level
        # The last block always trains: a ramp to 1.0 ends one block below the head.
        depth = min(int(share * seen.blocks + 1e-9), seen.blocks - 1)
        return Decision(max(depth, seen.depth)), Explained(
            f"{share:.3f} of {seen.blocks} blocks at {seen.progress:.3f}"
        )
