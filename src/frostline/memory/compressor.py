"""The compressor: for each training pass of a model, what autograd saves is packed.

Forward values stay exact; only what the backward pass reads is approximate. It works by type of operation and never
by model, through two things that torch offers: hooks on saved tensors, and a mode that sees the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from frostline.errors import ModelError
from frostline.memory.attention import attention, is_recomputable, recomputed_attention
from frostline.memory.codebook import coded_activation
from frostline.memory.levels import Level, level_named
from frostline.memory.operations import Call, Role, Watch
from frostline.memory.saved import Kept, Ledger, Shelf, is_small
from frostline.trace import has_compiled, unwrap

__all__ = ["Compressor", "compressing", "refuse_compiled"]


class compressing:
    """Pack what autograd saves inside of the ``with`` block.

    Args:
        model: whose parameters and buffers are left alone.
        level: name of a level (:data:`~frostline.memory.levels.LEVELS`), or a level.
        ledger: is told of what is kept.

    Only the innermost pair of saved-tensor hooks acts: inside a checkpointed block that is checkpointing's own, so
    that nothing of the block is packed, and its inputs are kept exactly. The backward pass belongs outside.
    """

    def __init__(self, model: nn.Module, level: str | Level, ledger: Ledger | None = None) -> None:
        level = level_named(level) if isinstance(level, str) else level
        self._shelf = Shelf(level, _weights(model), ledger)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        replaced: dict[Any, Callable[..., Tensor]] = {}
        if level.attention is not None:
            replaced[attention] = self._attention
        if level.activation == "code book":
            replaced |= {nn.functional.gelu: self._gelu, nn.functional.silu: self._silu}
        self._watch = Watch(replaced, {"dropout": self._dropped})

    def __enter__(self) -> None:
        self._hooks.__enter__()
        self._watch.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watch.__exit__(kind, error, at)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(kind, error, at)
        self._shelf.clear()
        # They know this object by its methods: a circle, which would hold the model until the garbage collector comes.
        del self._hooks, self._watch

    def _pack(self, saved: Tensor) -> Kept:
        return self._shelf.pack(saved, self._watch.call)

    def _dropped(self, call: Call, out: Any) -> None:
        self._shelf.dropped(call.argument(0, "input"), out, float(call.argument(1, "p", 0.5)))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention that is computed again in the backward pass, where that is possible and something is won."""
        mask = args[0] if args else kwargs.get("attn_mask")
        learned = isinstance(mask, Tensor) and mask.requires_grad  # its gradient comes from what would not be kept
        trains = (query.requires_grad or key.requires_grad or value.requires_grad) and not learned
        again = trains and is_recomputable(query, args[1] if len(args) > 1 else kwargs.get("dropout_p", 0.0))
        again = again and self._innermost()
        if again and isinstance(mask, Tensor):
            self._shelf.beside(mask, self._watch.call)
        chosen = recomputed_attention if again else attention
        return chosen(query, key, value, *args, **kwargs)

    def _gelu(self, input: Tensor, *, approximate: str = "none") -> Tensor:
        if self._is_coded(input):
            return coded_activation(input, "gelu-tanh" if approximate == "tanh" else "gelu")
        return nn.functional.gelu(input, approximate=approximate)

    def _silu(self, input: Tensor, inplace: bool = False) -> Tensor:
        if self._is_coded(input) and not inplace:
            return coded_activation(input, "silu")
        return nn.functional.silu(input, inplace)

    def _is_coded(self, x: Tensor) -> bool:
        plain = x.layout == torch.strided and x.is_floating_point()
        return plain and x.requires_grad and not is_small(x) and self._innermost()

    def _innermost(self) -> bool:
        """Whether it is our hooks that act: a checkpointed block must save the same when it runs again."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] == self._pack


def refuse_compiled(model: nn.Module) -> None:
    """Raises ModelError for a compiled model: its compiler decides what is saved."""
    if has_compiled(model):
        raise ModelError(
            "a compiled model (or one with compiled blocks) is not compressed: its compiler decides what is saved; "
            "train it without torch.compile, or with memory level 'off'"
        )


class Compressor:
    """Packs what every training pass of ``model`` saves, until :meth:`detach`.

    Args:
        model: any module; DDP is looked through.
        level: name of a level.
        entries: modules inside of it that a loop may call in its place (Lightning calls inner ones).

    Attributes:
        kept: the most bytes that any pass has kept for its backward pass, weights not counted.

    Raises:
        ConfigError: an unknown level.
        ModelError: a compiled model: its compiler decides what is saved.
    """

    def __init__(
        self,
        model: nn.Module,
        level: str = "slimfit",
        *,
        entries: Iterable[nn.Module] = (),
    ) -> None:
        self.level = level_named(level)
        refuse_compiled(model)
        self.kept = self._keeps = self._nested = 0
        self._model = unwrap(model)
        self._inside: tuple[nn.Module, compressing] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for module in dict.fromkeys((self._model, *entries)):
            # First of all hooks: the freezer's put the model in eval mode, what runs here must find it in train mode.
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Take the hooks away: the model saves whole tensors again."""
        self._end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, _: Any) -> None:
        # The cache runs the model again inside of a pass, without gradients: that is part of the pass.
        if not torch.is_grad_enabled() or self.level.name == "off":
            return
        again = self._inside is not None and self._inside[0] is module
        if not module.training:
            self._nested += again  # the engine looks at what the model does with its first inputs
            return
        if again:
            self._end()  # an interrupt (Ctrl-C) cut the last pass off before its end
        if self._inside is None:
            self._keeps = self._nested = 0
            packing = compressing(self._model, self.level, self._count)
            packing.__enter__()  # may be refused: inside of torch.func.grad nothing may watch what is saved
            self._inside = module, packing

    def _count(self, operation: str, role: Role, nbytes: int) -> None:
        if self._nested:  # is gone before the pass goes on
            return
        self._keeps += nbytes
        self.kept = max(self.kept, self._keeps)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside is None or self._inside[0] is not module or not torch.is_grad_enabled():
            return
        if self._nested:
            self._nested -= 1
        else:
            self._end()

    def _end(self) -> None:
        if self._inside is not None:
            (_, running), self._inside = self._inside, None
            running.__exit__(None, None, None)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, some of them twice; asked for in every pass, so without torch's names and paths."""
    found = [model]
    for module in found:  # grows as it goes
        found.extend(child for child in module._modules.values() if child is not None)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _unpack(kept: Kept) -> Tensor:
    return kept.restore()
