"""What a user may say of packing."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from frostline.settings import Bytes, one_of, options_in

__all__ = ["MODES", "RATES", "PackOptions"]

MODES = ("none", "performance", "efficiency")
"""What to do with the memory that freezing frees: nothing; larger batches on all ranks; fewer ranks."""

RATES = ("auto", "linear", "sqrt", "none")
"""How the learning rate follows a batch that grows: in proportion, with its square root, or not at all."""


class PackOptions(BaseModel):
    """How freed memory is spent when a recipe is launched on several ranks.

    ``mode``: ``none``; ``performance`` (the ranks stay, their micro-batches grow: the shortest time); ``efficiency``
    (the batch stays and moves to fewer ranks: the lowest cost). ``memory``: bytes (or "16GiB") that a rank may take
    (null: what the first stage takes as it begins). ``largest``: how many times the first batch a batch may
    become. ``rate``: of the learning rate as the batch grows (auto: ``linear`` for SGD, ``sqrt`` for the Adam family).
    ``restart``: seconds that a change of stage is taken to cost (null: measured; 0: change wherever it fits).
    ``price``: of one rank for one hour.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: str = "none"
    memory: Bytes | None = Field(default=None, gt=0)
    largest: int = Field(default=4, ge=1)
    rate: str = "auto"
    restart: float | None = Field(default=None, ge=0.0)
    price: float | None = Field(default=None, ge=0.0)

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        return options_in(value, cls, "mode", MODES)

    @field_validator("mode", mode="before")
    @classmethod
    def _mode_is_known(cls, value: Any) -> str:
        return one_of("pack.mode", value, MODES)

    @field_validator("rate", mode="before")
    @classmethod
    def _rate_is_known(cls, value: Any) -> str:
        return one_of("pack.rate", value, RATES)

    def factor(self, growth: float, *, adaptive: bool) -> float:
        """Times the first learning rate, of a batch that is ``growth`` times the first.

        Adam and its kin divide by the gradient's own size, whose noise falls with the square root of the batch; SGD's
        step is the sum over samples as long as the rate grows as the batch does.

        Args:
            growth: of the batch, at most ``largest``.
            adaptive: whether the optimizer is of the Adam family.
        """
        rule = ("sqrt" if adaptive else "linear") if self.rate == "auto" else self.rate
        return {"linear": growth, "sqrt": math.sqrt(growth), "none": 1.0}[rule]
