"""Where training passes are caught: hooks that let a pass skip the frozen prefix, and that end the skip with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from frostline.cache.passes import Passes
from frostline.errors import ModelError
from frostline.trace import Call

__all__ = ["Hooks"]

logger = logging.getLogger("frostline")


class Hooks:
    """Hooks on the modules around a stack; the outermost one that training calls is the one that counts.

    Args:
        serve: gives, for a training batch, the passes of the model that runs, the depth and the boundary activation
            ``[rows, ...]`` with which it may start there; or ``None`` where it has to run as it is.
        failed: takes a code and a reason when ``serve`` raised.
    """

    def __init__(
        self, serve: Callable[[nn.Module, Call], tuple[Passes, int, Tensor] | None], failed: Callable[[str, str], None]
    ) -> None:
        self._serve, self._failed = serve, failed
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._model: nn.Module | None = None
        self._inside: tuple[nn.Module, Passes] | None = None
        self._busy = False

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def install(self, modules: Iterable[nn.Module], model: nn.Module | None = None) -> None:
        """Catch passes of ``modules``; ``model`` is the one that they stand for, where they are wrappers of it."""
        self._model = model
        for module in modules:
            # First of all hooks: the freezer's put the model in eval mode, what runs here must find it in train mode.
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def uninstall(self) -> None:
        """Take every hook away, and end a skip that is under way."""
        self._end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside is not None and self._inside[0] is module:
            self._end()  # an interrupt (Ctrl-C) cut the last pass off before its end
        run = module if self._model is None else self._model
        if self._busy or self._inside is not None or not run.training or not torch.is_grad_enabled():
            return
        self._busy = True
        call: Call = (args, kwargs)
        try:
            served = self._serve(run, call)
            # Without the hook that ends it, no pass may begin to skip.
            if served is not None and self._handles:
                passes, depth, hidden = served
                self._inside = module, passes
                passes.begin(call, depth, hidden)
        except ModelError as error:
            self._give_up("model", str(error))
        except Exception as error:
            # Whatever goes wrong here must not cost the run: the uncached pass is always right.
            logger.debug("caching failed", exc_info=True)
            self._give_up("error", f"{type(error).__name__}: {error}")
        finally:
            self._busy = False

    def _give_up(self, code: str, reason: str) -> None:
        self._end()
        self._failed(code, reason)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside is not None and self._inside[0] is module:
            self._end()

    def _end(self) -> None:
        if self._inside is not None:
            self._inside[1].end()
            self._inside = None
