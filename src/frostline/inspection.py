"""What each part of a model weighs and costs: the figures behind ``frostline inspect``.

How the times are taken. The whole model runs in train mode on made-up input, forward and backward, and the clock
is read wherever the hidden state enters a block. In the forward pass a hook on each block reads it. In the
backward pass a hook on the hidden state's gradient does: autograd runs what was recorded last first, so when the
gradient at the entry of block i is complete, every gradient of block i (its weights' too) is there and nothing
below has begun. Each part therefore has its own time inside a real step, and the parts add up to the whole. What
runs between two blocks (a downsampling layer) counts for the block before it, with which it freezes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from frostline.blocks import BlockStack, Owner
from frostline.errors import ConfigError, ModelError
from frostline.memory import LEVELS, Footprint, footprint
from frostline.trace import Call, first_tensor, made_up_call, undisturbed

__all__ = ["Inspection", "Part", "inspect_model", "now", "timed_pass"]


@dataclass(frozen=True)
class Part:
    """The stem, one block or the head.

    Attributes:
        name: ``stem``, ``block 0`` .. ``block N-1``, ``head``.
        path: dotted path (of the stem and the head: of their outermost modules).
        parameters, bytes: of everything that freezes with this part; a shared tensor counts once.
        freezes_with: modules and parameters that stand elsewhere in the model and freeze with this part, and the
            second names of tied tensors.
        boundary_bytes_per_sample, boundary_bytes_per_token: the hidden state that leaves this part: what a record
            holds when the frost line lies right behind it. Per token only where it is ``[batch, tokens, width]``;
            ``None`` for the head.
        saved_bytes: what autograd keeps for this part's backward pass, for the whole batch: unique storages without
            parameters and buffers, each counted for the first part that saves it.
        forward_seconds, backward_seconds: medians over the repeats, for the whole batch.
    """

    name: str
    path: str
    parameters: int
    bytes: int
    freezes_with: tuple[str, ...]
    boundary_bytes_per_sample: int | None = None
    boundary_bytes_per_token: int | None = None
    saved_bytes: int | None = None
    forward_seconds: float | None = None
    backward_seconds: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found. ``parts`` is the stem, N blocks and the head, in this order.

    ``length`` is in tokens; ``None`` where it was not used (images, audio, nothing measured). ``memory`` is what is
    kept for the backward pass at each level of compression, where that was asked for.
    """

    model: str
    stack: str
    batch: int
    length: int | None
    parts: list[Part]
    limits: list[str]
    memory: list[Footprint] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return len(self.parts) - 2

    def bounds(self) -> list[float] | None:
        """The least a step can take at depth 0..N-1 without a cache, as a share of the full step.

        Everything runs forward; only what lies above the frost line runs backward. With blocks of equal cost, a
        backward pass of twice the forward pass and nothing else this is (3N - 2k) / 3N. The optimizer's own step
        is not in it. ``None`` where nothing could be measured.
        """
        forward = [part.forward_seconds for part in self.parts if part.forward_seconds is not None]
        backward = [part.backward_seconds for part in self.parts if part.backward_seconds is not None]
        if not forward:
            return None
        full = sum(forward) + sum(backward)
        # The stem, at position 0, freezes with block 0.
        above = [backward, *(backward[depth + 1 :] for depth in range(1, self.blocks))]
        return [(sum(forward) + sum(rest)) / full for rest in above]

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "bounds": self.bounds()}


def inspect_model(
    model: nn.Module,
    *,
    blocks: str | None = None,
    batch: int = 8,
    length: int = 64,
    repeats: int = 5,
    memory: bool = False,
) -> Inspection:
    """Find the parts of ``model`` and measure them on made-up input, where it is.

    The model is left as it was: modes, gradients, buffers and the random state. Where no input can be made up
    (a plain module), the parts come without measurements and a limit says so.

    Args:
        model: any module whose stack can be found.
        blocks: dotted path of the list of blocks, where the model has several or none is found.
        batch: samples in the made-up batch.
        length: tokens per sample (text only; images and audio have the size that the configuration names).
        repeats: timed passes, after one that is not timed.
        memory: count what is kept for the backward pass at each level of compression, too.

    Raises:
        ConfigError: ``batch``, ``length`` or ``repeats`` below 1, or more tokens than the model has positions for.
        ModelError: no stack in the model, or it does not run on the made-up input.
    """
    for name, value in (("batch", batch), ("length", length), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    stack = BlockStack.find(model, blocks)
    limits = list(stack.limits)
    if not stack.traced:
        limits.append(
            "the model was not traced: what stands outside the blocks is told apart by the order of registration"
        )
    runner, call = made_up_call(stack.model, stack.blocks, batch, length)
    tokens = call is not None and "input_ids" in call[1]
    measured = None
    if call is None:
        limits.append(f"no input can be made up for {type(stack.model).__name__}: nothing was measured")
    else:
        if tokens:
            _check_length(runner, length)
        measured = _measure(runner, stack, call, repeats, tuple(LEVELS) if memory else ("off",))
    owners: list[Owner] = ["stem", *range(len(stack)), "head"]
    parts = [_part(stack, owner, position, measured) for position, owner in enumerate(owners)]
    kept = measured.kept if measured is not None and memory else []
    return Inspection(type(stack.model).__name__, stack.path, batch, length if tokens else None, parts, limits, kept)


def _check_length(runner: nn.Module, length: int) -> None:
    config: Any = runner.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise ConfigError(f"length={length}: {type(runner).__name__} has positions for at most {most} tokens")


# -- what belongs together ----------------------------------------------------------------------------


def _part(stack: BlockStack, owner: Owner, position: int, measured: _Measured | None) -> Part:
    own = stack.parameters_of(owner)
    if isinstance(owner, int):
        name, path = f"block {owner}", stack.block_paths[owner]
        inside = f"{path}."
        # By module: a parent's name says more than those of its weight and bias.
        apart = {n.rpartition(".")[0] or n for n in own if not n.startswith(inside)}
    else:
        name, path = owner, ", ".join(stack.paths_of(owner))
        apart = {n for n in own if not n.startswith(tuple(f"{p}." for p in stack.paths_of(owner)))}
    ids = {id(parameter) for parameter in own.values()}
    every = stack.model.named_parameters(remove_duplicate=False)
    tied = {f"{n} (tied)" for n, parameter in every if id(parameter) in ids and n not in own}
    weights = Part(
        name,
        path,
        sum(p.numel() for p in own.values()),
        sum(p.numel() * p.element_size() for p in own.values()),
        (*sorted(apart), *sorted(tied)),
    )
    return weights if measured is None else measured.add_to(weights, position)


# -- what is measured ---------------------------------------------------------------------------------


@dataclass
class _Measured:
    """By position: 0 is the stem, 1..N the blocks, N + 1 the head. ``boundary[i]`` is what leaves position i."""

    boundary: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    kept: list[Footprint] = field(default_factory=list)  # by level; the first is without compression
    forward: list[list[float]] = field(default_factory=list)
    backward: list[list[float]] = field(default_factory=list)

    def note_boundary(self, index: int, hidden: torch.Tensor | None) -> None:
        """``hidden`` enters block ``index``: it is what leaves the position before."""
        if hidden is not None:
            sample = hidden.numel() * hidden.element_size() // hidden.shape[0]
            self.boundary[index] = (sample, sample // hidden.shape[1] if hidden.dim() == 3 else None)

    def add_to(self, part: Part, position: int) -> Part:
        sample, token = self.boundary.get(position, (None, None))
        return Part(
            part.name, part.path, part.parameters, part.bytes, part.freezes_with, sample, token,
            self.kept[0].by_part()[position],
            statistics.median(times[position] for times in self.forward),
            statistics.median(times[position] for times in self.backward),
        )  # fmt: skip


def _measure(
    runner: nn.Module, stack: BlockStack, call: Call, repeats: int, levels: tuple[str, ...]
) -> _Measured:  # fmt: skip
    found = _Measured()
    gradients = [(p, p.grad) for p in runner.parameters()]
    # With the model itself as the only "block", no requires_grad is touched: what was born frozen is measured so.
    with undisturbed(runner, [runner]), torch.enable_grad():
        runner.train()
        # Not in place: what is there belongs to the caller.
        runner.zero_grad(set_to_none=True)
        try:
            with _hooks(stack, found.note_boundary):
                found.kept = [footprint(runner, stack.blocks, call, level) for level in levels]
            for _ in range(repeats):
                forward, backward = timed_pass(runner, stack, call)
                found.forward.append(forward)
                found.backward.append(backward)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{type(runner).__name__} does not run on made-up input: {reason}") from error
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
    return found


@contextmanager
def _hooks(stack: BlockStack, enter: Any) -> Iterator[None]:
    """Call ``enter(i, hidden)`` when a hidden state enters block i, and with i = N when it leaves the last one."""

    def before(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            enter(index, first_tensor(args, kwargs))

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        enter(len(stack), first_tensor(output if isinstance(output, tuple) else (output,), {}))

    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(stack.blocks)]
    handles.append(stack.blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def timed_pass(runner: nn.Module, stack: BlockStack, call: Call) -> tuple[list[float], list[float]]:
    """Seconds of the stem, each block and the head in one pass of ``runner``: forward, and backward."""
    last = len(stack)
    entered: dict[int, float] = {}
    returned: dict[int, float] = {}

    def enter(index: int, hidden: torch.Tensor | None) -> None:
        def complete(_: torch.Tensor) -> None:
            returned[index] = now()

        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(complete)  # type: ignore[no-untyped-call]
        entered[index] = now()

    runner.zero_grad(set_to_none=True)
    with _hooks(stack, enter):
        start = now()
        output = runner(*call[0], **call[1])
        end = now()
    loss = _scalar(output)
    back_start = now()
    torch.autograd.backward(loss)
    back_end = now()
    # A block that did not run (LayerDrop) or has no graph below it (a frozen stem) took no time.
    forward, backward = [end] * (last + 1), [back_end] * (last + 1)
    for index in reversed(range(last + 1)):
        forward[index] = entered.get(index, forward[index + 1] if index < last else end)
    for index in range(last + 1):
        backward[index] = returned.get(index, backward[index - 1] if index else back_end)
    up, down = [start, *forward, end], [back_end, *backward, back_start]
    return [b - a for a, b in zip(up, up[1:], strict=False)], [a - b for a, b in zip(down, down[1:], strict=False)]


def _scalar(output: Any) -> torch.Tensor:
    """Something to call ``backward`` on: the mean of each tensor in the output, added up."""
    tensors = list(_tensors(output))
    if not tensors:
        raise TypeError("its output has no tensor that requires gradients")
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
