"""Which operation saves a tensor, and what that tensor is to it.

A pack hook is given a tensor and nothing else. A :class:`TorchFunctionMode` around the forward pass knows the
operation that runs and its arguments; together they say which role a saved tensor plays, whatever model it is of
(prototypes.md B2). An operation that is not known here keeps what it saves exactly as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "Role", "Watch", "role_of"]


class Role(Enum):
    """What a saved tensor is to the operation that saves it."""

    EXACT = "kept as it is"
    LINEAR = "input of a layer with weights"
    WIDE = "input of a layer that makes it four times narrower or more"
    MATMUL = "factor of a product of activations"
    ATTENTION = "query, key or value of attention"
    PROBABILITIES = "output of a softmax"
    NOISE = "noise of dropout"
    ACTIVATION = "input of an activation function of the GELU family"
    SIGN = "output of ReLU"
    NORM = "input of a normalisation that trains"
    RESTING_NORM = "input of a normalisation that rests"
    BATCH_NORM = "input of a normalisation over samples"
    ELEMENTWISE = "factor of an elementwise operation"


class Call(NamedTuple):
    """One call of an operation."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """The argument that stands at ``place`` or is called ``name``."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


class Watch(TorchFunctionMode):
    """Knows the operation that runs.

    Args:
        replaced: what to run in place of an operation, by the function that the model calls.
        done: told of each call and what came of it.
    """

    def __init__(self, replaced: Mapping[Any, Callable[..., Any]], done: Callable[[Call, Any], None]) -> None:
        super().__init__()
        self.call: Call | None = None
        self._replaced, self._done = replaced, done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Properties (shape, dtype, device) are half of all calls, and save nothing.
        name = getattr(func, "__name__", "")
        if name == "__get__" or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        before, self.call = self.call, Call(_plain(name), args, kwargs)
        try:
            out = self._replaced.get(func, func)(*args, **kwargs)
            self._done(self.call, out)
        finally:
            self.call = before
        return out


def _plain(name: str) -> str:
    """``__matmul__``, ``matmul`` and ``matmul_`` are one operation; so are ``mul``, ``__rmul__`` and ``__imul__``."""
    name = name.strip("_")
    return _ALIASES.get(name, name)


_ALIASES = {
    "rmul": "mul",
    "imul": "mul",
    "multiply": "mul",
    "rmatmul": "matmul",
    "imatmul": "matmul",
    "mm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "ipow": "pow",
    "swish": "silu",
}
_WEIGHTED = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"})
# Smooth and bounded in what they read back: a small error stays small. Not division, roots or logarithms.
_ELEMENTWISE = frozenset(
    {"mul", "tanh", "sigmoid", "erf", "mish", "elu", "softplus", "hardswish", "hardtanh", "relu6", "leaky_relu"}
)
# With the place of the weight among their arguments.
_NORMS = {"layer_norm": 2, "rms_norm": 2, "group_norm": 2}
# Neighbours in memory belong to several channels or samples, each with a scale of its own.
_BATCH_NORMS = frozenset({"batch_norm", "instance_norm"})


def role_of(call: Call | None, saved: Tensor) -> Role:
    """What ``saved``, a floating tensor that is not a parameter, is to the operation that saves it."""
    if call is None:
        return Role.EXACT
    name, first = call.name, call.argument(0, "input")
    if name == "addmm":
        first = call.argument(1, "mat1")
    elif name == "scaled_dot_product_attention":
        first = call.argument(0, "query")
    if not isinstance(first, Tensor):
        return Role.EXACT
    like_first = saved.numel() == first.numel()
    if name in _WEIGHTED:
        weight = call.argument(2, "mat2") if name == "addmm" else call.argument(1, "weight")
        if not like_first or _is_cast(saved, weight):
            return Role.EXACT
        return Role.WIDE if name in ("linear", "addmm") and _narrows(first, weight) else Role.LINEAR
    if name == "matmul":
        factors = [arg for arg in call.args if isinstance(arg, Tensor)]
        return Role.EXACT if any(_is_cast(saved, factor) for factor in factors) else Role.MATMUL
    if name == "scaled_dot_product_attention":
        given = (first, call.argument(1, "key"), call.argument(2, "value"))
        return Role.ATTENTION if any(_shares_memory(saved, tensor) for tensor in given) else Role.EXACT
    if name == "softmax":
        return Role.PROBABILITIES if like_first else Role.EXACT
    if name == "dropout":
        return Role.NOISE if like_first and not _shares_memory(saved, first) else Role.EXACT
    if name in ("gelu", "silu"):
        return Role.ACTIVATION if like_first else Role.EXACT
    if name == "relu":
        return Role.SIGN if like_first else Role.EXACT
    if name in _NORMS:
        weight = call.argument(_NORMS[name], "weight")
        if not like_first:
            return Role.EXACT  # mean, deviation
        return Role.NORM if weight is not None and weight.requires_grad else Role.RESTING_NORM
    if name in _BATCH_NORMS:
        return Role.BATCH_NORM if like_first else Role.EXACT
    if name in _ELEMENTWISE or (name == "pow" and _whole(call.argument(1, "exponent"))):
        return Role.EXACT if saved.shape[-1] == 1 else Role.ELEMENTWISE  # one deviation a row, say
    return Role.EXACT


def _is_cast(saved: Tensor, argument: Any) -> bool:
    """Whether ``saved`` may be what autocast made of a weight: packing it would free nothing, and lose something."""
    if not isinstance(argument, Tensor) or argument.dtype == saved.dtype:
        return False
    if not (argument if argument._base is None else argument._base).is_leaf:
        return False
    shape: tuple[int, ...] = tuple(argument.shape)
    return tuple(saved.shape) in (shape, shape[::-1])


def _narrows(first: Tensor, weight: Tensor) -> bool:
    width = first.shape[-1]
    return weight.dim() == 2 and 4 * (weight.numel() // max(1, width)) <= width


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _whole(exponent: Any) -> bool:
    """Powers of which the derivative is smooth: x ** n for n >= 1."""
    return isinstance(exponent, (int, float)) and exponent >= 1
