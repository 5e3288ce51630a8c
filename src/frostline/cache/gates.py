"""What must hold before a record is used: the boundary activation is the same each time, and skipping is exact.

A gate compares values of the running model on one of its own batches; it knows no model by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from frostline.cache.codecs import Codec
from frostline.cache.identity import Rows
from frostline.cache.passes import Passes, slice_rows, tensors_in
from frostline.trace import Call

__all__ = ["Check", "check", "padding_safe", "wants_inner_states"]

# Relative to the largest value. Padding to another length changes the last bits (5e-7 measured); a lost mask 0.3.
_FP32_TOLERANCE = 1e-5
_LOW_PRECISION_STEPS = 8


@dataclass(frozen=True)
class Check:
    """What a gate has found; differences are relative to the largest value.

    ``noise``: between passes as trained; ``difference``: outputs, skipped against full; ``codec``: name of the codec,
    ``error``: what it does to the boundary activation, ``error_output``: and to the output. ``dtypes``: of the hidden
    state at depth 0 to the frost line.
    """

    dtypes: list[torch.dtype]
    noise: float
    difference: float = 0.0
    refusal: str | None = None
    codec: str = "raw"
    error: float = 0.0
    error_output: float = 0.0

    def numbers(self) -> dict[str, Any]:
        found = {"noise": self.noise, "difference": self.difference, "refusal": self.refusal}
        lossy = {"codec": self.codec, "error": self.error, "error_output": self.error_output}
        return found if self.codec == "raw" else {**found, **lossy}


def check(passes: Passes, call: Call, named: Rows, depth: int, depths: Iterable[int], codec: Codec) -> Check:
    """Compare passes of one batch.

    Args:
        call: the batch; ``named``: its rows.
        depth: the frost line.
        depths: where there are records: passes will enter there.
        codec: how records are written; what a lossy one costs is measured, and refused only where it is not a number.
    """
    inputs = passes.look(call, depth)
    line, dtypes = inputs[depth], [value.dtype for value in inputs]
    noise = max(_difference(line, seen) for seen in passes.as_trained(call, depth, 2))
    if noise > _tolerance(line):
        why = (
            f"the boundary activation at depth {depth} of one batch differs from pass to pass by {noise:.1e}: "
            "the model draws random numbers, or keeps a mode, below the frost line"
        )
        return Check(dtypes, noise, refusal=why)
    for earlier in sorted(depths):
        if earlier < depth:
            moved = _difference(line, passes.prefill(call, depth, earlier, inputs[earlier]))
            if moved > _tolerance(line):
                return Check(dtypes, noise, moved, f"entering at block {earlier} changes the boundary activation at "
                             f"depth {depth} by {moved:.1e}")  # fmt: skip
    full = passes.output(call)

    def apart(hidden: Tensor) -> float:
        pairs = _pairs(full, passes.output(call, depth, hidden), named.real)
        return max((_difference(a, b) for a, b in pairs), default=0.0)

    difference = apart(line)
    if difference > 10 * _tolerance(line):
        return Check(
            dtypes, noise, difference, f"skipping {depth} blocks changes the model's output by {difference:.1e}"
        )
    if not codec.lossy:
        return Check(dtypes, noise, difference)
    decoded = codec.decode(codec.encode(line), line.dtype)
    error, error_output = _difference(line, decoded), apart(decoded)
    fits = max(error, error_output) < float("inf")
    refusal = None if fits else f"the boundary activation at depth {depth} does not fit into {codec.name}"
    return Check(dtypes, noise, difference, refusal, codec.name, error, error_output)


def padding_safe(passes: Passes, call: Call, named: Rows, depth: int) -> bool:
    """Whether a sample alone, without padding, gives the boundary activation that it has beside a longer one."""
    real = named.real
    assert real is not None
    row = int(real.sum(1).argmin())
    batch = passes.prefill(call, depth)
    if batch.dim() < 3 or batch.shape[:2] != real.shape:
        return False
    columns = real[row].nonzero().squeeze(1)

    def trim(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == real.shape[1]:
            return value[:, columns.to(value.device)]
        return value

    one = slice_rows(call, [row], len(real))
    alone = passes.prefill((tree_map(trim, one[0]), tree_map(trim, dict(one[1]))), depth)
    inside = batch[row][real[row].to(batch.device)]
    if alone.shape[1:] != inside.shape or _difference(inside, alone[0]) > _tolerance(batch):
        return False
    # And the blocks above must not look at what stands in place of the padding.
    emptied = torch.zeros_like(batch)
    emptied[real.to(batch.device)] = batch[real.to(batch.device)]
    pairs = _pairs(passes.output(call), passes.output(call, depth, emptied), real)
    return all(_difference(a, b) <= 10 * _tolerance(batch) for a, b in pairs)


def wants_inner_states(module: nn.Module, call: Call) -> bool:
    """Whether the caller asks for hidden states or attentions of every block: none may be skipped then."""
    names = ("output_hidden_states", "output_attentions")
    config = getattr(module, "config", None)
    return any(call[1].get(name) or getattr(config, name, False) for name in names)


def _pairs(full: Any, skipped: Any, real: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Tensors of two outputs side by side; of those with a row for each token, the real tokens."""
    ours, theirs = (
        tensors_in(((), value if isinstance(value, Mapping) else _fields(value))) for value in (skipped, full)
    )
    pairs = []
    for name, a in theirs.items():
        b = ours.get(name)
        if b is None or not a.is_floating_point() or a.shape != b.shape:
            continue
        if real is not None and a.shape[:2] == real.shape:
            a, b = a[real.to(a.device)], b[real.to(b.device)]
        pairs.append((a, b))
    return pairs


def _fields(value: Any) -> Mapping[str, Any]:
    if isinstance(value, (Tensor, tuple, list)):
        return {"output": value}
    return vars(value) if hasattr(value, "__dict__") else {}


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``a``; infinite where shapes differ or one is not finite."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    wide_a, wide_b = a.detach().double(), b.detach().double()
    value = float((wide_a - wide_b).abs().max() / wide_a.abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def _tolerance(value: Tensor) -> float:
    return max(_FP32_TOLERANCE, _LOW_PRECISION_STEPS * torch.finfo(value.dtype).eps)
