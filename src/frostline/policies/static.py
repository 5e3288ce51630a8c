"""Policy ``static``: the first k blocks (or a fraction of them) are frozen from the first step."""

from __future__ import annotations

from pydantic import Field, model_validator

from frostline.policies.base import Decision, Explained, Observation, Plan, Policy, PolicyOptions, checked_depth

__all__ = ["Static", "StaticOptions"]


class StaticOptions(PolicyOptions):
    """Exactly one of the two: ``depth`` in blocks, or ``fraction`` of the stack (rounded down)."""

    depth: int | None = Field(default=None, ge=0)
    fraction: float | None = Field(default=None, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _one_of_two(self) -> StaticOptions:
        if (self.depth is None) == (self.fraction is None):
            raise ValueError("give either depth=<blocks> or fraction=<0..1>, not both and not neither")
        return self


class Static(Policy[StaticOptions]):
    """Freezes once, at the start, and never changes its mind."""

    name = "static"
    summary = "the first k blocks, or a fraction of them, from the start"
    Options = StaticOptions

    def __init__(self, options: StaticOptions, plan: Plan) -> None:
        super().__init__(options, plan)
        if options.depth is not None:
            depth, given = options.depth, f"depth={options.depth}"
        else:
            assert options.fraction is not None
            depth, given = int(options.fraction * plan.blocks), f"fraction={options.fraction}"
        self.depth = checked_depth(depth, plan, f"policy 'static', {given}")

    def start(self) -> Decision:
        return Decision(self.depth)

    def decide(self, seen: Observation) -> tuple[Decision, Explained]:
        return Decision(self.depth), Explained("static")
