"""Attention of which only the queries, keys and values are kept; it is computed again in the backward pass.

Nothing else that attention saves is kept (probabilities, dropout, its output); the random state is, so that dropout
falls the same way twice. It stands in for ``scaled_dot_product_attention``, whoever calls it. The forward pass is that
of the function itself, with gradients enabled, so that the same kernel is chosen: its output is the same bit for bit.

A CPU has no fused kernel with dropout: there the backward pass would hold half a dozen matrices of ``[batch, heads,
length, length]``, the most that a whole step holds at once. They are made for a few rows of the batch at a time.

Source: prototypes.md B3 ("slimattn"); recomputing attention alone is FlashAttention's trade (arXiv 2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from frostline.memory.aside import nothing_packed, unchanged

__all__ = ["attention", "is_recomputable", "recomputed_attention"]

attention = torch.nn.functional.scaled_dot_product_attention

# Bytes of one such matrix: it stays in the processor's caches.
_PART = 4 * 2**20


def is_recomputable(query: Tensor, dropout: float) -> bool:
    """Whether the same can be computed again: values without gaps between them, and noise that can be drawn again."""
    if query.layout != torch.strided:
        return False
    kind = query.device.type
    return not dropout or kind == "cpu" or hasattr(torch.get_device_module(kind), "default_generators")


def recomputed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """``scaled_dot_product_attention`` of ``[..., length, width]``, which saves its three inputs and nothing else.

    It has no second derivative: a backward pass with ``create_graph`` raises RuntimeError.
    """
    asked = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **options}
    out: Tensor = _Recomputed.apply(query, key, value, asked)  # type: ignore[no-untyped-call]
    return out


class _Ambience(NamedTuple):
    """What decides how attention runs, beside its arguments."""

    device: torch.device
    random: Tensor | None
    autocast: bool
    dtype: torch.dtype
    kernels: list[SDPBackend]

    @classmethod
    def now(cls, device: torch.device, *, random: bool) -> _Ambience:
        kind, state = device.type, _random_state(device) if random else None
        kernels = _cur_sdpa_kernel_backends(with_priority=True)
        return cls(device, state, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), kernels)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same precision, kernels and random numbers; the state of the generator is put back."""
        here = _random_state(self.device) if self.random is not None else None
        if self.random is not None:
            _set_random_state(self.device, self.random)
        try:
            with ExitStack() as differs:  # for each block of each step: what is as it was is left alone
                now = _Ambience.now(self.device, random=False)
                if (now.autocast, now.autocast and now.dtype) != (self.autocast, self.autocast and self.dtype):
                    precision = torch.autocast(self.device.type, self.dtype, self.autocast, cache_enabled=False)
                    differs.enter_context(precision)
                if now.kernels != self.kernels:
                    differs.enter_context(sdpa_kernel(self.kernels, set_priority=True))
                yield
        finally:
            if here is not None:
                _set_random_state(self.device, here)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> Tensor:
        ctx.ambience, ctx.asked = _Ambience.now(query.device, random=asked["dropout_p"] > 0), asked
        mask = asked["attn_mask"]
        ctx.version = mask._version if mask is not None and not mask.is_inference() else None
        ctx.save_for_backward(query, key, value)
        # Where there is but one way to run it, nothing of it is held until the end.
        if _is_unfused(query, key, value, asked, ctx.ambience):
            return attention(query, key, value, **asked)
        # Or with gradients, whose graph is thrown away at once.
        with torch.enable_grad(), nothing_packed():
            query, key, value = _leaves((query, key, value), ctx.needs_input_grad)
            return attention(query, key, value, **asked).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compressed attention is computed again in the backward pass and has no second derivative "
                "(create_graph=True): use memory level 'off' or 'published'"
            )
        if ctx.version is not None:
            unchanged(ctx.asked["attn_mask"], ctx.version)
        inputs = query, key, value = _leaves(ctx.saved_tensors, ctx.needs_input_grad)
        if _is_unfused(query, key, value, ctx.asked, ctx.ambience):
            return (*_by_parts(inputs, gradients[0], ctx.asked, ctx.ambience), None)
        # A backward pass inside of a forward pass must not meet what stands in for attention there.
        with torch._C.DisableTorchFunction(), torch.enable_grad(), nothing_packed(), ctx.ambience.again():
            out = attention(query, key, value, **ctx.asked)
        found = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], gradients))
        return (*(next(found) if tensor.requires_grad else None for tensor in inputs), None)


def _is_unfused(query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any], ambience: _Ambience) -> bool:
    """Whether attention runs as :func:`_with_noise` does: each product by itself, in the precision of its inputs."""
    return (
        query.device.type == "cpu"
        and 0 < asked["dropout_p"] < 1
        and query.dtype in (torch.float32, torch.float64)
        and query.dim() == 4
        and len(query) > 0
        and query.shape[:2] == key.shape[:2] == value.shape[:2]  # else one key serves several heads, or rows
        and not ambience.autocast
    )


def _by_parts(
    inputs: Sequence[Tensor], gradient: Tensor, asked: dict[str, Any], ambience: _Ambience
) -> list[Tensor | None]:
    """The gradients of ``inputs`` (query, key, value; ``None`` where none is wanted), some rows of the batch at a time.

    Dropout's noise is drawn for all of them at once, as in the forward pass, and kept as one byte each.
    """
    query, key, _ = inputs
    rows, (heads, length) = len(query), query.shape[1:3]
    with ambience.again():
        drawn = torch.empty(rows, heads, length, key.shape[-2], dtype=query.dtype).bernoulli_(1 - asked["dropout_p"])
        noise = drawn.bool()
    at_once = max(1, _PART // max(1, drawn[0].nbytes))
    del drawn
    found = [torch.empty_like(tensor) if tensor.requires_grad else None for tensor in inputs]
    for first in range(0, rows, at_once):
        place = slice(first, first + at_once)
        leaves = _leaves((tensor[place] for tensor in inputs), (tensor.requires_grad for tensor in inputs))
        with torch._C.DisableTorchFunction(), torch.enable_grad(), nothing_packed():
            out = _with_noise(leaves, noise[place], asked, place)
        values = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], gradient[place]))
        for whole in found:
            if whole is not None:
                whole[place] = next(values)
    return found


def _with_noise(inputs: Sequence[Tensor], noise: Tensor, asked: dict[str, Any], place: slice) -> Tensor:
    """Attention of some rows of the batch, with dropout's ``noise``: where it is false, a probability is dropped."""
    query, key, value = inputs
    scale, mask = asked.get("scale"), asked["attn_mask"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    root = abs(scale) ** 0.5  # both factors are scaled, as torch does it
    scores = (query * math.copysign(root, scale)) @ (key * root).transpose(-2, -1)
    if asked["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        mask = mask[place] if mask.dim() == 4 and len(mask) > 1 else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities: Tensor = torch._safe_softmax(scores, -1)
    kept: Tensor = probabilities * noise / (1 - asked["dropout_p"])
    return kept @ value


def _leaves(tensors: Iterable[Tensor], wanted: Iterable[bool]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=False)]


def _random_state(device: torch.device) -> Tensor:
    state: Tensor = _generator(device).get_state()
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    _generator(device).set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    """The one that kernels on ``device`` draw from."""
    if device.type == "cpu":
        return torch.default_generator
    generator: torch.Generator = torch.get_device_module(device).default_generators[device.index]
    return generator
