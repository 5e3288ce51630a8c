"""Which operation saves a tensor, and what that tensor is to it.

A pack hook is given a tensor and nothing else. A :class:`TorchFunctionMode` around the forward pass knows the
operation that runs and its arguments; together they say which role a saved tensor plays, whatever model it is of
(prototypes.md B2). An operation that is not known here keeps what it saves exactly as it is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Call", "Role", "Watch", "cast_from", "role_of"]


class Role(Enum):
    """What a saved tensor is to the operation that saves it."""

    # A key of dictionaries for every tensor that is saved: Enum's own is many times slower.
    __hash__ = object.__hash__

    EXACT = "kept as it is"
    LINEAR = "input of a layer with weights"
    WIDE = "input of a layer that makes it four times narrower or more"
    MATMUL = "factor of a product of activations"
    ATTENTION = "query, key or value of attention"
    PROBABILITIES = "output of a softmax"
    NOISE = "noise of dropout"
    ACTIVATION = "input of an activation function of the GELU family"
    SIGN = "output of ReLU"
    KINK = "input of a piecewise linear activation function"
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


# What a saved tensor is to a call, whose first tensor is given as well.
_Finder = Callable[[Call, Tensor, Tensor], Role]


class Watch(TorchFunctionMode):
    """Knows the operation that runs.

    Args:
        replaced: what to run in place of an operation, by the function that the model calls.
        done: by the name of an operation, what is told of each call of it and what came of it.
    """

    def __init__(
        self, replaced: Mapping[Any, Callable[..., Any]], done: Mapping[str, Callable[[Call, Any], None]]
    ) -> None:
        super().__init__()
        self.call: Call | None = None
        self._replaced, self._done = replaced, done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or not torch.is_grad_enabled():  # properties (shape, dtype, device) save nothing
            return func(*args, **kwargs)
        if _OPENED.get(name) is func:
            with self:
                return _opened(func)(*args, **kwargs)
        before = self.call
        self.call = call = Call(_plain(name), args, kwargs)
        try:
            out = self._replaced.get(func, func)(*args, **kwargs)
            if call.name in self._done:
                self._done[call.name](call, out)
        finally:
            self.call = before
        return out


# Functions of torch that hand themselves over whole, although it is their parts that save.
_OPENED = {"multi_head_attention_forward": torch.nn.functional.multi_head_attention_forward}


@functools.cache
def _opened(func: Any) -> Callable[..., Any]:
    """``func``, torch's own code, which goes on into its parts instead of asking for somebody that takes it whole."""
    namespace = {**func.__globals__, "has_torch_function": lambda _: False}
    same = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__)
    same.__kwdefaults__ = func.__kwdefaults__
    return same


@functools.cache
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


def role_of(call: Call | None, saved: Tensor) -> Role:
    """What ``saved``, a floating tensor that is not a parameter, is to the operation that saves it."""
    if call is None or (found := _ROLES.get(call.name)) is None:
        return Role.EXACT
    first = _first(call)
    return found(call, first, saved) if isinstance(first, Tensor) else Role.EXACT


def cast_from(call: Call | None, saved: Tensor, role: Role) -> Tensor | None:
    """What autocast made ``saved`` of, if it did: it casts an input anew for each layer that reads it."""
    if call is None or role not in (Role.LINEAR, Role.WIDE):
        return None
    first, weight = _first(call), _weight(call)
    cast = first.dtype != saved.dtype and first.is_contiguous() and saved.is_contiguous()
    # What is made of a weight (a sum with adapters, say) may look the same.
    return first if cast and weight.numel() != saved.numel() else None


def _first(call: Call) -> Any:
    given = call.argument(*_FIRST.get(call.name, (0, "input")))
    return given[0] if isinstance(given, (list, tuple)) and given else given


def _weight(call: Call) -> Any:
    return call.argument(2, "mat2") if call.name == "addmm" else call.argument(1, "weight")


def _weighted(call: Call, first: Tensor, saved: Tensor) -> Role:
    weight = _weight(call)
    if saved.numel() != first.numel() or _is_cast(saved, weight):
        return Role.EXACT
    return Role.WIDE if call.name in ("linear", "addmm") and _narrows(first, weight) else Role.LINEAR


def _matmul(call: Call, first: Tensor, saved: Tensor) -> Role:
    return Role.EXACT if any(_is_cast(saved, factor) for factor in _factors(call)) else Role.MATMUL


def _einsum(call: Call, first: Tensor, saved: Tensor) -> Role:
    # Of a weight whose dimensions were to change places a copy is saved, which looks like any other factor.
    copied = any(_is_leaf(factor) and factor.numel() == saved.numel() for factor in _factors(call))
    return Role.EXACT if copied else _matmul(call, first, saved)


def _factors(call: Call) -> list[Tensor]:
    given = (each for arg in call.args for each in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return [each for each in given if isinstance(each, Tensor)]


def _attention(call: Call, first: Tensor, saved: Tensor) -> Role:
    given = (first, call.argument(1, "key"), call.argument(2, "value"))
    return Role.ATTENTION if any(_shares_memory(saved, tensor) for tensor in given) else Role.EXACT


def _dropout(call: Call, first: Tensor, saved: Tensor) -> Role:
    return Role.NOISE if saved.numel() == first.numel() and not _shares_memory(saved, first) else Role.EXACT


def _norm(call: Call, first: Tensor, saved: Tensor) -> Role:
    if saved.numel() != first.numel():
        return Role.EXACT  # mean, deviation
    weight = call.argument(2, "weight")
    return Role.NORM if weight is not None and weight.requires_grad else Role.RESTING_NORM


def _elementwise(call: Call, first: Tensor, saved: Tensor) -> Role:
    if call.name == "pow" and not _whole(call.argument(1, "exponent")):
        return Role.EXACT
    return Role.EXACT if saved.shape[-1] == 1 else Role.ELEMENTWISE  # one deviation a row, say


def _if_like_the_first(role: Role) -> _Finder:
    return lambda call, first, saved: role if saved.numel() == first.numel() else Role.EXACT


def _is_cast(saved: Tensor, argument: Any) -> bool:
    """Whether ``saved`` may be what autocast made of a weight: packing it would free nothing, and lose something."""
    if not isinstance(argument, Tensor) or argument.dtype == saved.dtype:
        return False
    if not _is_leaf(argument):
        return False
    shape: tuple[int, ...] = tuple(argument.shape)
    return tuple(saved.shape) in (shape, shape[::-1])


def _is_leaf(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a weight, or a view of one."""
    return (tensor if tensor._base is None else tensor._base).is_leaf


def _narrows(first: Tensor, weight: Tensor) -> bool:
    width = first.shape[-1]
    return weight.dim() == 2 and 4 * (weight.numel() // max(1, width)) <= width


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(other):  # inside of vmap it has no storage that could be asked
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _whole(exponent: Any) -> bool:
    """Powers of which the derivative is smooth: x ** n for n >= 1."""
    return isinstance(exponent, (int, float)) and exponent >= 1


_WEIGHTED = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
_NORMS = ("layer_norm", "rms_norm", "group_norm")
# Neighbours in memory belong to several channels or samples, each with a scale of its own.
_BATCH_NORMS = ("batch_norm", "instance_norm")
# Smooth and bounded in what they read back: a small error stays small. Not division, roots or logarithms.
_ELEMENTWISE = (
    "mul", "tanh", "sigmoid", "erf", "mish", "elu", "softplus", "hardswish", "pow"
)  # fmt: skip
# A value that is moved over a kink has another derivative, however little it is moved.
_KINKED = ("leaky_relu", "relu6", "hardtanh")
# Which argument is meant by the first one, where that is not the one at the front.
_FIRST = {"addmm": (1, "mat1"), "einsum": (1, "operands"), "scaled_dot_product_attention": (0, "query")}
_ROLES: dict[str, _Finder] = {
    **dict.fromkeys(_WEIGHTED, _weighted),
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "softmax": _if_like_the_first(Role.PROBABILITIES),
    "dropout": _dropout,
    "gelu": _if_like_the_first(Role.ACTIVATION),
    "silu": _if_like_the_first(Role.ACTIVATION),
    "relu": _if_like_the_first(Role.SIGN),
    **dict.fromkeys(_KINKED, _if_like_the_first(Role.KINK)),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_BATCH_NORMS, _if_like_the_first(Role.BATCH_NORM)),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
}
