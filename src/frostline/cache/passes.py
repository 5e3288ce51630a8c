"""Forward passes that enter a model at one block and leave it at another, without touching the model's code.

For the length of one pass the ``forward`` of each block that is skipped is replaced on the instance: hooks still
fire, names and attributes stay, and the model goes on supplying masks, positions and rotary tables to the block where
the hidden state comes in. Nothing stays behind, so copies and pickles of the model are those of an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from frostline.blocks import BlockStack
from frostline.errors import ModelError
from frostline.trace import Call, first_tensor, random_state_kept, replace_tensor

__all__ = ["Passes", "rows_of", "slice_rows", "tensors_in"]


class _Reached(Exception):
    """Unwinds a pass that has come to the block where it should stop."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the pass has reached its last block")
        self.hidden = hidden


@dataclass(frozen=True)
class _Ran:
    """What one block was called with, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def hidden(self) -> Tensor:
        value = first_tensor(self.args, self.kwargs)
        assert value is not None
        return value


@dataclass(frozen=True)
class _Link:
    """How the output of a skipped block is put together.

    ``kinds[j]`` says what element j of a tuple is: ``"hidden"``, ``"none"`` (nobody reads it), an input that the
    block hands on (its position or name), or ``"made"`` (a later block reads it: T5's position bias). A block that
    gives a bare tensor has no kinds. ``direct``: the next block receives the hidden state itself, untouched.
    """

    kinds: tuple[Any, ...] | None
    direct: bool
    sequence: type = tuple


def tensors_in(call: Call) -> dict[str, Tensor]:
    """Tensors of one call by name (``"0"``, ``"1"``, ... for positional ones); nested ones by their path."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                walk(f"{name}.{index}", item)

    for index, value in enumerate(call[0]):
        walk(str(index), value)
    for name, value in call[1].items():
        walk(name, value)
    return found


def rows_of(call: Call, main: str | None) -> int:
    """Samples in a call: the length of its main input (``main``, or its first tensor)."""
    tensors = tensors_in(call)
    value = tensors.get(main or "")
    if value is None:
        value = next((t for t in tensors.values() if t.dim()), None)
    return 0 if value is None else value.shape[0]


def slice_rows(call: Call, rows: Sequence[int], of: int) -> Call:
    """The call for some of its ``of`` samples. Only tensors with ``of`` rows are cut: the rest holds for all."""
    if list(rows) == list(range(of)):
        return call

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == of:
            return value[torch.as_tensor(rows, device=value.device)]
        return value

    return tree_map(cut, call[0]), tree_map(cut, dict(call[1]))


@contextmanager
def _aside(model: nn.Module | None) -> Iterator[None]:
    """A pass beside the training pass: without gradients, leaving nothing behind, and in eval mode if ``model``."""
    cached = torch.is_autocast_cache_enabled()
    # Autocast keeps the weights that it has cast for the rest of its context. Cast without gradients and kept, they
    # would cut the training pass that follows off from its weights.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), random_state_kept(), _all_eval(model) if model is not None else nullcontext():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _all_eval(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back; by the flag, because pinned modules answer ``train`` in their own way."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Passes:
    """Runs ``stack.model`` between any two blocks.

    Args:
        stack: where the model can be cut.
        module: the module whose ``forward`` a pass calls: the outermost one that training calls, around the stack.
    """

    def __init__(self, stack: BlockStack, module: nn.Module) -> None:
        self.stack, self.module = stack, module
        self.links: list[_Link] = []
        self._made: dict[tuple[Any, ...], dict[tuple[int, int], Any]] = {}
        self._now: dict[tuple[int, int], Any] = {}
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._entry: torch.utils.hooks.RemovableHandle | None = None

    @property
    def depth(self) -> int:
        """How many leading blocks have been looked at: a pass may enter at any of them."""
        return len(self.links)

    # -- learning how the blocks hang together ---------------------------------------------------------------

    def look(self, call: Call, depth: int) -> list[Tensor]:
        """Run the prefix of ``depth`` blocks once and learn its links.

        Returns:
            The input of blocks 0..``depth``, each ``[rows, ...]``.

        Raises:
            ModelError: a block that does not run once and in order, whose output is neither a tensor nor a tuple
                with the hidden state in it, or that hands later blocks something made anew for every row.
        """
        with _aside(self.stack.model):
            ran = self._watch(call, depth)
        self.links = [self._link(i, ran) for i in range(depth)]
        self._made.clear()
        self._remember(call, ran)
        return [r.hidden for r in ran]

    def _watch(self, call: Call, depth: int) -> list[_Ran]:
        ran: list[_Ran] = []

        def watch(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index != len(ran):
                    raise ModelError(f"block {index} runs as number {len(ran)}: blocks that do not run once and in "
                                     "order cannot be skipped")  # fmt: skip
                if first_tensor(args, kwargs) is None:
                    raise ModelError(f"block {index} takes no hidden state among its arguments")
                if index == depth:
                    ran.append(_Ran(args, kwargs))
                    raise _Reached(ran[-1].hidden)
                position = len(ran)
                ran.append(_Ran(args, kwargs))
                output = original(*args, **kwargs)
                ran[position] = _Ran(args, kwargs, output)
                return output

            return forward

        self._replace({i: watch(i, self.stack.blocks[i].forward) for i in range(depth + 1)})
        self._run(call)
        return ran

    def _link(self, index: int, ran: list[_Ran]) -> _Link:
        output, following = ran[index].output, ran[index + 1].hidden
        if isinstance(output, Tensor):
            return _Link(None, direct=_is(output, following))
        if not isinstance(output, (tuple, list)) or first_tensor(tuple(output), {}) is None:
            raise ModelError(f"block {index} gives a {type(output).__name__}: it cannot be skipped")
        at = next(j for j, v in enumerate(output) if isinstance(v, Tensor) and v.is_floating_point())
        inputs: dict[Any, Any] = {**dict(enumerate(ran[index].args)), **ran[index].kwargs}
        later = {id(leaf) for r in ran[index + 1 :] for leaf in tree_leaves((r.args, r.kwargs))}
        kinds: list[Any] = []
        for j, value in enumerate(output):
            if j == at:
                kinds.append("hidden")
            elif value is None or id(value) not in later:
                kinds.append("none")
            elif (source := next((k for k, v in inputs.items() if v is value), None)) is not None:
                kinds.append((source,))
            elif isinstance(value, Tensor) and value.shape[0] == 1:
                kinds.append("made")
            else:
                raise ModelError(f"block {index} makes something for each row that later blocks read: it must run")
        return _Link(tuple(kinds), _is(output[at], following), type(output))

    def _remember(self, call: Call, ran: list[_Ran]) -> None:
        made = {
            (i, j): ran[i].output[j]
            for i, link in enumerate(self.links)
            for j, kind in enumerate(link.kinds or ())
            if kind == "made"
        }
        self._made[_shapes(call)] = made

    # -- running ---------------------------------------------------------------------------------------------

    def prefill(self, call: Call, depth: int, enter: int = 0, hidden: Tensor | None = None) -> Tensor:
        """The input of block ``depth`` (``[rows, ...]``), from ``hidden``, the input of block ``enter``."""
        if enter == depth:
            assert hidden is not None
            return hidden
        with _aside(self.stack.model):
            self.begin(call, enter, hidden)
            self._replace({depth: _stop}, more=True)
            return self._run(call)

    def output(self, call: Call, enter: int = 0, hidden: Tensor | None = None) -> Any:
        """What the whole model gives in eval mode, with the blocks before ``enter`` skipped."""
        with _aside(self.stack.model):
            self.begin(call, enter, hidden)
            try:
                return self.module.forward(*call[0], **call[1])
            finally:
                self.end()

    def as_trained(self, call: Call, depth: int, times: int) -> list[Tensor]:
        """The input of block ``depth`` in as many passes, in the modes in which training runs them.

        The random numbers go on from pass to pass, so whatever is random shows as a difference.
        """
        found = []
        with _aside(None):
            for _ in range(times):
                self._replace({depth: _stop})
                found.append(self._run(call, hooks=True))
        return found

    def begin(self, call: Call, enter: int, hidden: Tensor | None) -> None:
        """From now until :meth:`end` a pass skips the blocks before ``enter``, which receives ``hidden``.

        Raises:
            ModelError: block ``enter`` is checkpointed, and would be recomputed from something else than ``hidden``.
        """
        if enter == 0:
            return
        assert hidden is not None
        direct = self.links[enter - 1].direct
        if (
            not direct
            and torch.is_grad_enabled()
            and getattr(self.stack.blocks[enter], "gradient_checkpointing", False)
        ):
            raise ModelError(
                f"something between blocks {enter - 1} and {enter} works on the hidden state, and block {enter} is "
                "checkpointed: it would be recomputed from another hidden state than it was given"
            )
        self._now = self._extras(call)
        self._replace({i: self._bypass(i, hidden if direct and i == enter - 1 else None) for i in range(enter)})
        if not direct:  # something between the blocks works on the hidden state (DeBERTa's convolution)
            block = self.stack.blocks[enter]
            self._entry = block.register_forward_pre_hook(_give(hidden), prepend=True, with_kwargs=True)

    def end(self) -> None:
        """Give the blocks their own ``forward`` back."""
        if self._entry is not None:
            self._entry.remove()
            self._entry = None
        for block, own in reversed(self._replaced):
            if own is None:
                del block.forward
            else:
                block.forward = own
        self._replaced, self._now = [], {}

    def _extras(self, call: Call) -> dict[tuple[int, int], Any]:
        """What skipped blocks make for later ones; it depends on the shape of a batch, not on its rows."""
        shapes = _shapes(call)
        if shapes not in self._made:
            if any("made" in (link.kinds or ()) for link in self.links):
                with _aside(self.stack.model):
                    one = slice_rows(call, [0], rows_of(call, getattr(self.module, "main_input_name", None)))
                    self._remember(call, self._watch(one, self.depth))
            else:
                self._made[shapes] = {}
        return self._made[shapes]

    def _bypass(self, index: int, hidden: Tensor | None) -> Callable[..., Any]:
        link, made = self.links[index], self._now

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = first_tensor(args, kwargs) if hidden is None else hidden
            if link.kinds is None:
                return value
            inputs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            return link.sequence(
                value if kind == "hidden"
                else made[index, j] if kind == "made"
                else inputs.get(kind[0]) if isinstance(kind, tuple)
                else None
                for j, kind in enumerate(link.kinds)
            )  # fmt: skip

        return forward

    def _replace(self, forwards: Mapping[int, Callable[..., Any]], *, more: bool = False) -> None:
        assert more or not self._replaced, "a pass inside a pass"
        for index, forward in forwards.items():
            block = self.stack.blocks[index]
            self._replaced.append((block, vars(block).get("forward")))
            block.forward = forward

    def _run(self, call: Call, *, hooks: bool = False) -> Tensor:
        # forward, not __call__: hooks of the module (ours too) belong to the training pass; what a host wraps
        # around forward (Accelerate's autocast) holds here as well.
        run = self.module if hooks else self.module.forward
        try:
            run(*call[0], **call[1])
        except _Reached as reached:
            return reached.hidden
        finally:
            self.end()
        raise ModelError("the pass ended without reaching the frost line")


def _stop(*args: Any, **kwargs: Any) -> Any:
    value = first_tensor(args, kwargs)
    assert value is not None
    raise _Reached(value)


def _give(hidden: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        old = first_tensor(args, kwargs)
        assert old is not None
        return replace_tensor(args, kwargs, old, hidden)

    return hook


def _is(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bits in the same place."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _shapes(call: Call) -> tuple[Any, ...]:
    return tuple(sorted((name, tuple(t.shape[1:]), t.dtype) for name, t in tensors_in(call).items() if t.dim()))
