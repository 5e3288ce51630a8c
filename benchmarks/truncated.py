"""The two models whose times add up to the bound of a step at depth k.

The truncated model is blocks k..N-1 and the head alone, fed from memory. It is the model's own code, run on a copy
that shares the weights: the list of blocks is cut, and the stem is replaced by a module that hands out a stored
hidden state. The blocks below k do not exist there: no wrapper and no hook stands in for them, and the optimizer
never hears of their weights, so nothing that Frostline could be slow at is in the bound. The prefix is a second
copy in eval mode, run without gradients and left at the entry of block k.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from frostline import BlockStack, ModelError
from frostline.trace import first_tensor

__all__ = ["Prefix", "Truncated", "shared_copy"]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


class _Reached(Exception):
    """Leaves a forward pass with the hidden state that it came for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = first_tensor(args, kwargs)
    assert hidden is not None
    raise _Reached(hidden)


class Prefix:
    """Stem and blocks below ``depth``: :meth:`run` gives the boundary activation of a batch."""

    def __init__(self, stack: BlockStack, depth: int) -> None:
        self._model = shared_copy(stack.model).eval()
        block = self._model.get_submodule(stack.block_paths[depth])
        block.register_forward_pre_hook(_leave, with_kwargs=True)

    @torch.no_grad()
    def run(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            self._model(**batch)
        except _Reached as reached:
            return reached.hidden
        raise AssertionError("the forward pass did not come to the boundary")


class _Stored(nn.Module):
    """Stands where the stem stood and hands out a hidden state from memory."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.hidden


class Truncated:
    """Blocks ``depth``..N-1 and head in train mode; at depth 0 the whole model.

    ``parameters`` are the ones that train at this depth. Set ``hidden`` before the first forward of :attr:`model`.

    Raises:
        ModelError: the blocks are no plain list, or no module of the stem hands its output straight to block 0.
    """

    def __init__(self, stack: BlockStack, depth: int, batch: Mapping[str, torch.Tensor]) -> None:
        self.model = shared_copy(stack.model).train()
        below = {id(p) for p in stack.prefix_parameters(depth).values()}
        self._stored: _Stored | None = None
        if depth:
            if stack.block_paths != [f"{stack.path}.{i}" for i in range(len(stack))]:
                raise ModelError(f"the blocks of {stack.path!r} are no plain list: it cannot be cut")
            source = _source(stack, batch)
            self._stored = _Stored()
            self.model.set_submodule(source, self._stored)
            self.model.set_submodule(stack.path, nn.ModuleList(list(self.model.get_submodule(stack.path))[depth:]))
        self.parameters = [p for p in self.model.parameters() if id(p) not in below]

    def feed(self, hidden: torch.Tensor) -> None:
        """The boundary activation that the next steps start from."""
        assert self._stored is not None
        self._stored.hidden = hidden


def _source(stack: BlockStack, batch: Mapping[str, torch.Tensor]) -> str:
    """Path of the stem's module whose output is what enters block 0."""
    given: dict[str, torch.Tensor | None] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            given[path] = first_tensor(output if isinstance(output, tuple) else (output,), {})

        return hook

    model = stack.model
    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in stack.paths_of("stem")]
    handles.append(stack.blocks[0].register_forward_pre_hook(_leave, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**batch)
    except _Reached as reached:
        for path, output in given.items():
            if output is reached.hidden:
                return path
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(f"{type(model).__name__}: no module of the stem hands its output straight to block 0")
