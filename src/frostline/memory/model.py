"""M(batch, depth, level, F): what a training step takes of memory, before it is run in that way.

A step holds weights, the optimizer's state, gradients and activations, but never all of them in full: the backward
pass frees the activations of a part as it makes its gradients. With the parts in the order in which they run (stem,
blocks, head), the most that is there is

    weights + state + max over parts i of (kept by parts 0..i + working memory of part i + gradients of parts above i)

and a part below the frost line keeps nothing and has neither gradients nor state. With several ranks the buckets are
added in which gradients are exchanged. What parts keep and work with is measured on two small batches, in each way in
which a step may be run, with gradients left out: both grow with the batch, gradients do not. F, the share of layers
that rest, is measured as it is: with those at rest that rest.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frostline.blocks import BlockStack, Owner
from frostline.distributed import Buckets
from frostline.errors import ModelError
from frostline.memory.compressor import compressing
from frostline.memory.peak import LiveBytes
from frostline.memory.spans import Activations, Spans
from frostline.trace import first_tensor, undisturbed

__all__ = ["Bench", "MemoryModel", "OptimizerCost", "Way", "nbytes_of", "optimizer_cost"]

_NOT_EACH_ONCE = (
    "a pass that was to be measured for the memory budget ran {} of {} blocks: what a step takes is left to chance. "
    "Switch off what skips blocks at random (LayerDrop: model.config.layerdrop = 0), or train without memory.budget"
)
# Rows of the batch on which ways are measured; the other one that is needed has half as many.
PROBE_ROWS = 4


@dataclass(frozen=True)
class Way:
    """How a step is run: compression level, and whether blocks are checkpointed."""

    level: str = "off"
    checkpointing: bool = False

    def __str__(self) -> str:
        return "gradient checkpointing" if self.checkpointing else f"level {self.level}"


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes for each byte of weights that train: kept between steps, and taken for the length of the step itself."""

    state: float
    step: float


def optimizer_cost(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], sample: Tensor) -> OptimizerCost:
    """Measure an optimizer on a copy of one weight, rather than on the model: that would allocate what is asked about.

    Args:
        build: makes the optimizer of a list of parameters.
        sample: a weight of the model.
    """
    copy = nn.Parameter(sample.detach().clone())
    optimizer = build([copy])
    copy.grad = torch.zeros_like(copy)
    optimizer.step()
    size = copy.numel() * copy.element_size()
    state = [v for v in optimizer.state.get(copy, {}).values() if isinstance(v, Tensor) and v.numel() > 1]
    with LiveBytes([copy, copy.grad, *state]) as live:
        optimizer.step()
    held = sum(value.numel() * value.element_size() for value in state)
    return OptimizerCost(held / size, max(0, live.peak - held - 2 * size) / size)


@dataclass(frozen=True)
class Bench:
    """What it takes to run a step of a model: for measuring.

    Attributes:
        stack: of the model, as it is going to train (mode, ``requires_grad``).
        batch: the inputs of a batch of that many samples, the largest that training brings.
        loss: of such inputs.
        context: around the forward pass (autocast).
    """

    stack: BlockStack
    batch: Callable[[int], Mapping[str, Any]]
    loss: Callable[[Mapping[str, Any]], Tensor]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def model(self) -> nn.Module:
        return self.stack.model

    @contextmanager
    def ready(self, way: Way) -> Iterator[None]:
        """The model trains in ``way``; afterwards it is as it was, its gradients, buffers and random state too."""
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        with contextlib.ExitStack() as exits:
            exits.enter_context(undisturbed(self.model, [self.model]))
            exits.enter_context(torch.enable_grad())
            if way.checkpointing:
                exits.enter_context(_checkpointed(self.model))
            self.model.train()
            try:
                yield
            finally:
                for parameter, gradient in gradients:
                    parameter.grad = gradient

    def spans(self, way: Way, rows: int) -> Spans:
        """Run a forward and a backward pass and count, part by part. On a GPU its allocator is asked.

        Raises:
            ModelError: the pass did not run each block once.
        """
        batch = dict(self.batch(rows))
        weights = [*self.model.parameters(), *self.model.buffers()]
        blocks, device = self.stack.blocks, weights[0].device
        with self.ready(way), contextlib.ExitStack() as hooks:
            self.model.zero_grad(set_to_none=True)
            present = [*weights, *(value for value in batch.values() if isinstance(value, Tensor))]
            meter = _Allocator(device) if device.type == "cuda" else LiveBytes(present)
            start = meter.now
            forward, backward = _Marks(meter), _Marks(meter)
            leaving: list[int] = []

            def passes(hidden: Tensor | None) -> None:
                forward.mark()
                leaving.append(_size(hidden))
                if hidden is not None and hidden.requires_grad:
                    # Complete when what is above has run backward: autograd runs what was recorded last first.
                    hidden.register_hook(lambda _: backward.mark())  # type: ignore[no-untyped-call]

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                passes(first_tensor(args, kwargs))

            def leave(_: nn.Module, __: Any, output: Any) -> None:
                passes(first_tensor(output if isinstance(output, tuple) else (output,), {}))

            handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
            handles.append(blocks[-1].register_forward_hook(leave))
            for handle in handles:
                hooks.callback(handle.remove)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    counted = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        lambda p: meter.forget(p.grad)
                    )
                    hooks.callback(counted.remove)
            with meter:
                loss = self.forward(way, batch)
                forward.mark()
                if len(leaving) != len(blocks) + 1:
                    raise ModelError(_NOT_EACH_ONCE.format(len(leaving) - 1, len(blocks)))
                for handle in handles:  # a checkpointed block runs again
                    handle.remove()
                meter.restart()
                loss.backward()  # type: ignore[no-untyped-call]
                backward.mark()
            ends = [end - start for end in forward.now]
            kept = [b - a for a, b in itertools.pairwise([0, *ends])]
            # Backward marks come from the head down; where nothing below trains there are fewer.
            peaks = [0] * (len(kept) - len(backward.peaks)) + [peak - start for peak in reversed(backward.peaks)]
            return Spans(
                tuple(kept),
                tuple(peak - start - below for peak, below in zip(forward.peaks, [0, *ends], strict=False)),
                tuple(max(0, peak - end) for peak, end in zip(peaks, ends, strict=True)),
                (*leaving, 0),
            )

    def workspace(self) -> int:
        """Bytes that a GPU's libraries take at their first use and keep (cuBLAS' workspaces)."""
        device = next(self.model.parameters()).device
        if device.type != "cuda":
            return 0
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated(device)
        try:
            self.spans(Way(), 1)
        except torch.OutOfMemoryError:  # not even one row fits: whoever asks for more finds out
            return 0
        return max(0, torch.cuda.memory_allocated(device) - before)

    def forward(self, way: Way, batch: Mapping[str, Any]) -> Tensor:
        """The loss of ``batch``, in the level of ``way``."""
        with self.context(), compressing(self.model, way.level) if way.level != "off" else nullcontext():
            return self.loss(batch)

    def seconds(self, way: Way, rows: int, repeats: int = 2) -> float:
        """The fastest of ``repeats`` forward and backward passes, after one that is not timed."""
        batch = dict(self.batch(rows))
        device = next(self.model.parameters()).device
        best = float("inf")
        with self.ready(way):
            for number in range(repeats + 1):
                self.model.zero_grad(set_to_none=True)
                _synchronise(device)
                start = time.perf_counter()
                loss = self.forward(way, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                _synchronise(device)
                best = min(best, time.perf_counter() - start) if number else best
        return best


class _Marks:
    """Bytes alive at each mark, and the most that was alive since the mark before."""

    def __init__(self, meter: LiveBytes | _Allocator) -> None:
        self._meter = meter
        self.now: list[int] = []
        self.peaks: list[int] = []

    def mark(self) -> None:
        self.now.append(self._meter.now)
        self.peaks.append(self._meter.peak)
        self._meter.restart()


class _Allocator:
    """What :class:`LiveBytes` says, by a GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._forgotten = device, 0
        self.restart()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self._device)

    def forget(self, tensor: Tensor) -> None:
        self._forgotten += tensor.untyped_storage().nbytes()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._since = self._forgotten

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._forgotten

    @property
    def peak(self) -> int:
        # What was forgotten since the last mark may have been there at the peak: counted, to be on the safe side.
        return torch.cuda.max_memory_allocated(self._device) - self._since


class MemoryModel:
    """Predicts the peak of a step, in bytes.

    Args:
        weights: bytes of all parameters and buffers.
        trains: bytes of the weights that train, by part (stem, blocks, head).
        activations: in each way that was measured.
        optimizer: what it takes.
        resting: bytes of weights that rest and whose optimizer state is kept on the device.
        held: bytes of whatever else is there from step to step (sums of gradients, workspaces).
        buckets: of the data-parallel wrapper, with several ranks.
    """

    def __init__(
        self,
        weights: int,
        trains: Sequence[int],
        activations: Mapping[Way, Activations],
        optimizer: OptimizerCost,
        resting: int = 0,
        held: int = 0,
        buckets: Buckets | None = None,
    ) -> None:
        self.weights, self.trains, self.resting, self.held = weights, list(trains), resting, held
        self.buckets = buckets
        self.activations, self.optimizer = dict(activations), optimizer

    @classmethod
    def measure(
        cls,
        bench: Bench,
        ways: Iterable[Way],
        optimizer: OptimizerCost,
        resting: int = 0,
        held: int = 0,
        buckets: Buckets | None = None,
    ) -> MemoryModel:
        """Measure each of ``ways`` on small batches."""
        stack = bench.stack
        owners: list[Owner] = ["stem", *range(len(stack)), "head"]
        trains = [nbytes_of(p for p in stack.parameters_of(owner).values() if p.requires_grad) for owner in owners]
        weights = nbytes_of((*bench.model.parameters(), *bench.model.buffers()))
        found = cls(weights, trains, {}, optimizer, resting, held + bench.workspace(), buckets)
        for way in ways:
            found.activations[way] = found.calibrated(bench, way)
        return found

    def peak(self, way: Way, rows: int, depth: int = 0, *, accumulates: bool = False) -> int:
        """The most bytes alive at any moment of a step with ``rows`` samples in each micro-batch.

        Args:
            way: one that was measured.
            rows: samples in a micro-batch.
            depth: of the frost line.
            accumulates: whether gradients of earlier micro-batches are there already.
        """
        trains = self._above(self.trains, depth)
        passes = self._passes(self.activations[way], rows, depth, accumulates=accumulates)
        most = max(passes, sum(trains) * (1 + self.optimizer.step))
        if self.buckets is not None:
            # The wrapper is built before anything is frozen, and follows the line afterwards.
            most = max(most + sum(trains) + self.buckets.asleep, self.buckets.first)
        state = (sum(trains) + self.resting) * self.optimizer.state
        return round(self.weights + state + self.held + most)

    def calibrated(self, bench: Bench, way: Way, rows: int = PROBE_ROWS) -> Activations:
        """What ``way`` keeps and needs for a moment, measured on batches of ``rows`` samples and of half as many."""
        less = max(1, rows // 2)
        bench.spans(way, 1)  # what is made once, at its first use, is no part of a step
        many = bench.spans(way, rows)
        return Activations.through(bench.spans(way, less) if less < rows else many, less, many, rows)

    # -- inside -------------------------------------------------------------------------------------

    def _passes(self, activations: Activations, rows: int, depth: int, *, accumulates: bool) -> float:
        """The most that activations and gradients take together."""
        found = activations.of(rows)
        trains, kept = self._above(self.trains, depth), self._above(found.kept, depth)
        below = [sum(kept[:i]) for i in range(len(kept))]
        gradients = [sum(trains) if accumulates else sum(trains[i + 1 :]) for i in range(len(trains))]
        frozen = range(depth + 1) if depth else range(0)
        # Without a backward pass of its own the prefix still hands on what enters the line, and most models' code
        # holds on to what left the stem until the last block has run.
        line = found.leaving[depth] if depth else 0
        stem = found.leaving[0] if depth else 0
        forward = [below[i] + found.forward[i] + (sum(trains) if accumulates else 0) for i in range(len(kept))]
        backward = [below[i] + kept[i] + found.backward[i] + gradients[i] for i in range(len(kept)) if i not in frozen]
        ends = [below[i] + sum(trains[i:]) for i in range(len(kept))]
        return max(*(stem + line + most for most in forward), *(line + most for most in (*backward, *ends)))

    @staticmethod
    def _above(values: Sequence[float], depth: int) -> list[float]:
        """Those of the parts above the line; the stem, at position 0, freezes with block 0."""
        return [value if depth == 0 or position > depth else 0 for position, value in enumerate(values)]


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of ``tensors``, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _size(hidden: Tensor | None) -> int:
    return hidden.numel() * hidden.element_size() if hidden is not None else 0


@contextmanager
def _checkpointed(model: Any) -> Iterator[None]:
    """Blocks are checkpointed, the non-reentrant way."""
    hooked = bool(getattr(model, "_require_grads_hooks", None))
    # transformers is renaming them.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        end_checkpointing(model, hooked=hooked)


def end_checkpointing(model: Any, *, hooked: bool) -> None:
    """Checkpoint no longer; the hook that comes with it goes too, unless it was there (``hooked``)."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    if not hooked and getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
