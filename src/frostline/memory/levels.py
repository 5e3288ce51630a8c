"""Levels: how far the tensors that autograd saves are compressed, role by role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from frostline.errors import ConfigError, choices_message
from frostline.memory.formats import Bits, FixedPoint, Format, Noise, Pruned, Rows, Sides
from frostline.memory.operations import Call, Role

__all__ = ["LEVELS", "Level", "level_named"]

_EIGHT, _FOUR, _UNSIGNED = Rows(8), Rows(4), Rows(8, signed=False)
_PUBLISHED_EIGHT = FixedPoint(3, 4)


@dataclass(frozen=True)
class Level:
    """The format of each role; ``None`` keeps what is saved as it is.

    ``activation`` and ``resting_norm`` may be words: ``"code book"`` (four bits of the derivative are kept in place of
    the input) and ``"pruned"`` (the largest tenth of the normalised values; the format depends on the call).
    ``attention``: what the queries, keys and values are kept in, from which the backward pass computes attention again;
    ``None``: whatever attention saves is compressed by role instead. ``masks``: booleans, and noise, as bits.
    ``slices``: a small piece of a large tensor is copied, so that it does not hold all of it.
    """

    name: str
    summary: str
    linear: Format | None = None
    wide: Format | None = None
    matmul: Format | None = None
    probabilities: Format | None = None
    activation: Format | str | None = None
    norm: Format | None = None
    resting_norm: Format | str | None = None
    batch_norm: Format | None = None
    elementwise: Format | None = None
    attention: Format | None = None
    masks: bool = True
    slices: bool = True

    def format_of(self, role: Role, call: Call, saved: Tensor) -> Format | None:
        """How a saved tensor of ``role`` is kept."""
        if role is Role.RESTING_NORM and self.resting_norm == "pruned":
            return _pruned(call, saved)
        if role is Role.KINK and self.masks:
            return _sides(call)
        return self._formats.get(role)

    @cached_property
    def _formats(self) -> dict[Role, Format]:
        """Of the roles whose format is the same in every call: this is asked for every tensor that is saved."""
        named = {role: getattr(self, role.name.lower(), None) for role in Role}
        if self.activation == "code book":
            named[Role.ACTIVATION] = self.elementwise  # of a call that could not be replaced
        if self.masks:
            named |= {Role.NOISE: Noise(), Role.SIGN: Bits()}
        return {role: how for role, how in named.items() if isinstance(how, Format)}


def _pruned(call: Call, saved: Tensor) -> Format | None:
    """Pruning of the input of a LayerNorm over the last dimension; of other normalisations nothing is published."""
    width = saved.shape[-1]
    last = call.name == "layer_norm" and tuple(call.argument(1, "normalized_shape", ())) == (width,)
    if not last or not saved.is_contiguous():
        return None
    return Pruned(width, float(call.argument(4, "eps", 1e-5)))


def _sides(call: Call) -> Format:
    """Where the derivative of a piecewise linear function changes."""
    if call.name == "leaky_relu":
        return Sides(0.0, math.inf)
    if call.name == "relu6":
        return Sides(0.0, 6.0)
    return Sides(float(call.argument(1, "min_val", -1.0)), float(call.argument(2, "max_val", 1.0)))  # hardtanh


_SAFE = Level(
    "safe",
    "8 bits everywhere; gradients within a cosine of 0.999",
    linear=_EIGHT, wide=_EIGHT, matmul=_EIGHT, probabilities=_UNSIGNED, activation=_EIGHT,
    norm=_EIGHT, resting_norm=_EIGHT, batch_norm=_EIGHT, elementwise=_EIGHT, attention=_EIGHT,
)  # fmt: skip

LEVELS = {
    level.name: level
    for level in (
        Level("off", "nothing is compressed", masks=False, slices=False),
        _SAFE,
        Level(
            "slimfit",
            "8 bits, 4 bits for the derivative of GELU and for normalisations that rest; within a cosine of 0.99",
            linear=_EIGHT, wide=_EIGHT, matmul=_EIGHT, probabilities=_UNSIGNED, activation="code book",
            norm=_EIGHT, resting_norm=_FOUR, batch_norm=_EIGHT, elementwise=_EIGHT, attention=_EIGHT,
        ),
        Level(
            "published",
            "SlimFit's released formats: fixed point, and pruning of normalisations that rest",
            wide=_PUBLISHED_EIGHT, matmul=_PUBLISHED_EIGHT, probabilities=FixedPoint(0, 8, signed=False),
            activation=FixedPoint(2, 1), resting_norm="pruned",
        ),
        Level(
            "max",
            "4 bits for attention and normalisations as well",
            linear=_EIGHT, wide=_EIGHT, matmul=_EIGHT, probabilities=_UNSIGNED, activation="code book",
            norm=_FOUR, resting_norm=_FOUR, batch_norm=_EIGHT, elementwise=_EIGHT, attention=_FOUR,
        ),
    )
}  # fmt: skip


def level_named(name: str) -> Level:
    """The level called ``name``.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    if name not in LEVELS:
        raise ConfigError(choices_message("memory level", name, LEVELS))
    return LEVELS[name]
