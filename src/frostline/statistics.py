"""What is measured while training: incremental, cheap, serialisable.

Statistics are read once per optimizer step from the accumulated, reduced, unscaled, unclipped gradient:
gradients are linear, so the sum over micro-batches is in ``.grad`` already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from frostline.distributed.shards import local, parts_again, total, whole
from frostline.errors import ResumeError

__all__ = ["GradientSum", "Measurements", "WeightChange", "compared", "learning_rate"]

# Values of a large layer that are compared, and how many times more it must have.
_COMPARED = 1 << 18
_WORTH_CHOOSING = 4


class GradientSum:
    """The vector sum of each block's gradients over an interval (AutoFreeze, Algorithm 1: D(T, l)).

    It costs one gradient copy of the active blocks in memory (4 bytes a parameter in fp32) and one fused
    multi-tensor addition a step. Gradients of less than 32 bits are summed in fp32.

    Args:
        blocks: block index -> its parameters by name, trainable ones only.
    """

    def __init__(self, blocks: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
        self._all = {block: dict(parameters) for block, parameters in blocks.items()}
        self._blocks = self._all
        self._sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def update(self, scale: float = 1.0, *, check: bool = False) -> bool:
        """Add the present gradients times ``scale``.

        Args:
            scale: 1 / loss scale under a gradient scaler.
            check: leave out a step whose gradients are not finite (the scaler will skip it). Returns False then.
        """
        sums, gradients, split = [], [], []
        for parameters in self._blocks.values():
            for name, parameter in parameters.items():
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    gradient = gradient.to_dense()
                if name not in self._sums:
                    dtype = torch.promote_types(gradient.dtype, torch.float32)
                    self._sums[name] = torch.zeros_like(gradient, dtype=dtype)
                sums.append(local(self._sums[name]))
                gradients.append(local(gradient).detach())
                split.append(gradient)
        if not gradients:
            return False
        if check:
            broken = not all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients))
            if total([float(broken)], split[:1])[0] > 0:  # of a model split over ranks one part may be sound
                return False
        torch._foreach_add_(sums, gradients, alpha=scale)
        self.steps += 1
        return True

    def norms(self) -> dict[int, float]:
        """L1 norm of the sum, per block. A block without any gradient so far has norm 0."""
        names = [name for parameters in self._blocks.values() for name in parameters if name in self._sums]
        sums = [self._sums[name] for name in names]
        norms = torch._foreach_norm([local(value) for value in sums], 1) if sums else ()
        found = dict(zip(names, total([float(norm) for norm in norms], sums), strict=True))
        return {
            block: float(sum(found[name] for name in parameters if name in found))
            for block, parameters in self._blocks.items()
        }

    def reset(self, active: Iterable[int]) -> None:
        """Start a new interval for the ``active`` blocks; the memory of the others is given back."""
        keep = set(active)
        self._blocks = {block: parameters for block, parameters in self._all.items() if block in keep}
        names = {name for parameters in self._blocks.values() for name in parameters}
        self._sums = {name: value for name, value in self._sums.items() if name in names}
        if self._sums:
            torch._foreach_zero_([local(value) for value in self._sums.values()])
        self.steps = 0

    def bytes(self) -> int:
        """Memory of the sums."""
        return sum(value.numel() * value.element_size() for value in map(local, self._sums.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, for a checkpoint; where the model is split over ranks, every rank must ask."""
        return {name: whole(value) for name, value in self._sums.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], steps: int, active: Sequence[int]) -> None:
        """Restore what :meth:`tensors` gave, on the device of each parameter."""
        self.reset(active)
        parameters = {name: p for group in self._blocks.values() for name, p in group.items()}
        unknown = sorted(set(tensors) - set(parameters))
        if unknown:
            raise ResumeError(
                f"the checkpoint has gradient sums of parameters this model lacks: {', '.join(unknown[:3])}"
            )
        for name, value in tensors.items():
            if value.shape != parameters[name].shape:
                raise ResumeError(
                    f"gradient sum of {name}: shape {tuple(value.shape)}, model {tuple(parameters[name].shape)}"
                )
        self._sums = {name: parts_again(value, parameters[name]) for name, value in tensors.items()}
        self.steps = steps


class WeightChange:
    """How far an optimizer step moves each layer: sum |after - before| / sum |before| (SlimFit, algorithms.md 3.2).

    The published mean of |change / weight| divides by every zero there is; a ratio of norms does not. Only what trains
    at the step is copied, and of a large layer only some values (:func:`compared`), for the length of the optimizer's
    own step.

    Args:
        layers: parameters by dotted path.
    """

    def __init__(self, layers: Mapping[str, nn.Parameter]) -> None:
        self._layers = dict(layers)
        self._before: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Remember the weights that the coming step changes: those that have a gradient."""
        self._before = {name: compared(p).clone() for name, p in self._layers.items() if p.grad is not None}

    @torch.no_grad()
    def after(self) -> dict[str, float] | None:
        """The change of each layer that had a gradient; ``None`` where nothing moved (a scaler skipped the step)."""
        before, self._before = self._before, {}
        copies, layers = list(before.values()), [self._layers[name] for name in before]
        sizes = _norms(copies)
        if copies:
            torch._foreach_sub_(copies, [compared(layer) for layer in layers])
        numbers = total([*sizes, *_norms(copies)], [*layers, *layers])
        tiny = torch.finfo(torch.float32).tiny
        changes = [
            move / max(size, tiny) for size, move in zip(numbers[: len(sizes)], numbers[len(sizes) :], strict=True)
        ]
        return dict(zip(before, changes, strict=True)) if any(changes) or not changes else None


def compared(parameter: torch.Tensor) -> torch.Tensor:
    """The values of ``parameter`` by which its change is told: all of a small one, of a large one every n-th.

    Some 2 ** 18 values tell a ratio of norms to a few parts in a thousand, or in a hundred where few rows of a table
    move. All of them would be a copy of what trains: as much as its gradients.
    """
    values = local(parameter).detach()
    step = values.numel() // _COMPARED
    if step < _WORTH_CHOOSING or not values.is_contiguous():
        return values
    return values.view(-1)[:: step | 1]  # odd, so that the columns of a matrix take turns


def _norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """L1 norms, summed in at least fp32."""
    if not tensors:
        return []
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(list(tensors), 1, dtype=wide)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()  # a model may lie on several devices


def learning_rate(optimizer: torch.optim.Optimizer | None) -> float | None:
    """The largest of the optimizer's groups; ``None`` where it has none (Adafactor may find its own)."""
    groups = optimizer.param_groups if optimizer is not None else []
    return max((float(group["lr"]) for group in groups if group.get("lr") is not None), default=None)


class Measurements:
    """What a policy needs measured, and nothing else.

    Args:
        needs: ``gradient_sum``, ``weight_change``, both or neither.
        blocks: block index -> its trainable parameters by name.
        layers: the parameters that a policy may let rest one by one, by dotted path.
    """

    def __init__(
        self,
        needs: Collection[str],
        blocks: Mapping[int, Mapping[str, nn.Parameter]],
        layers: Mapping[str, nn.Parameter],
    ) -> None:
        self._sums = GradientSum(blocks) if "gradient_sum" in needs else None
        self._change = WeightChange(layers) if "weight_change" in needs else None
        self._changes: dict[str, float] | None = None
        self._looked = False

    @property
    def steps(self) -> int:
        """Optimizer steps in this interval that the gradient sums cover."""
        return self._sums.steps if self._sums is not None else 0

    def before_step(self, scale: float = 1.0, *, check: bool = False) -> None:
        """Read the gradients (times ``scale``), and the weights as they are before the step."""
        self._looked = True
        if self._sums is not None:
            self._sums.update(scale, check=check)
        if self._change is not None:
            self._change.before()

    def after_step(self) -> bool:
        """Read the weights as they are after the step; whether :meth:`before_step` was called, without which there is
        nothing to compare them with."""
        looked, self._looked = self._looked, False
        if self._change is not None:
            self._changes = self._change.after() if looked else None
        return looked

    def observed(self) -> dict[str, Any]:
        """What an :class:`~frostline.policies.base.Observation` says of them."""
        scores = self._sums.norms() if self._sums is not None else None
        return {"scores": scores, "interval_steps": self.steps, "changes": self._changes}

    def reset(self, active: Iterable[int]) -> None:
        """Start a new interval for the ``active`` blocks."""
        if self._sums is not None:
            self._sums.reset(active)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep. Weight changes begin and end within a step."""
        return self._sums.tensors() if self._sums is not None else {}

    def load(self, tensors: Mapping[str, torch.Tensor], steps: int, active: Sequence[int]) -> None:
        """Restore what :meth:`tensors` gave."""
        if self._sums is not None:
            self._sums.load(tensors, steps, active)
