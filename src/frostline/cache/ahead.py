"""Looking at the coming batches, so that what is slow to read is read before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frostline.cache.identity import identify, precision_of
from frostline.cache.passes import rows_of
from frostline.trace import Call

__all__ = ["Lookout", "watched"]

# Announced batches that the model then got otherwise, one after the other, before nothing is announced any more.
_PATIENCE = 8
# Announced batches that are waited for: with accumulation a host fetches all micro-batches of a step before the first.
_REMEMBERED = 256


class Lookout:
    """Names the samples of a coming batch as the model will see them.

    A loader yields what the model is called with, except for what the loop adds (flags, autocast): that is taken from
    the last batch that came by.
    """

    def __init__(self) -> None:
        self._flags: dict[str, Any] | None = None
        self._precision: torch.dtype | None = None
        self._announced: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._otherwise = 0

    @property
    def lost(self) -> bool:
        """Whether the model gets other inputs than the loader yields."""
        return self._otherwise >= _PATIENCE

    def give_up(self) -> None:
        """The loader yields something that cannot be named."""
        self._otherwise = _PATIENCE

    def came(self, call: Call, first: bytes) -> None:
        """A batch has come by; ``first`` is the name of its first sample."""
        self._flags = {k: v for k, v in call[1].items() if not isinstance(v, Tensor)}
        self._precision = precision_of(call)
        if first in self._announced:
            self._otherwise = 0
            while self._announced.popleft() != first:
                pass
        elif self._announced:
            self._otherwise += 1

    def names(self, batch: Any, main: str | None, *, padding_safe: bool) -> list[bytes]:
        """The names of a coming batch's samples; none before a first batch has shown how the model is called."""
        if self.lost or self._flags is None or not isinstance(batch, Mapping):
            return []
        call: Call = ((), {**self._flags, **{k: v for k, v in batch.items() if isinstance(v, Tensor)}})
        rows = rows_of(call, main)
        keys = identify(call, rows, padding_safe=padding_safe, precision=self._precision).keys if rows else []
        self._announced.extend(keys[:1])
        return keys


class _Seen:
    """A loader whose batches are shown to ``see`` as they are made; everything else is the loader's own."""

    def __init__(self, loader: Iterable[Any], see: Callable[[Any], None]) -> None:
        self._loader, self._see = loader, see

    def __iter__(self) -> Iterator[Any]:
        # The loader's own iterator is made now: what that draws or agrees on with other ranks must happen even where
        # nobody goes on to ask it for a batch.
        return self._shown(iter(self._loader))

    def _shown(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._see(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # while it is copied or unpickled it has none
            raise AttributeError(name)
        return getattr(self._loader, name)


class _Inner(_Seen):
    """The same, inside a loader of Accelerate, which asks what its inner loader is."""

    if not TYPE_CHECKING:  # mypy knows no read-only __class__

        @property
        def __class__(self) -> type:
            return type(self._loader)


class _Ahead(_Seen):
    """The same, one batch ahead of who asks for it."""

    def _shown(self, batches: Iterator[Any]) -> Iterator[Any]:
        batches = super()._shown(batches)
        for held in batches:
            for following in batches:
                yield held
                held = following
            yield held


def watched(loader: Any, see: Callable[[Any], None]) -> Any:
    """``loader`` with ``see`` called on each batch at least one batch before it is handed out.

    Accelerate's loaders (the Trainer's too) are one batch ahead already, and tell by it when an epoch ends: their
    inner loader is watched, and they are given back themselves.
    """
    if hasattr(loader, "base_dataloader"):
        inner = loader.base_dataloader
        loader.base_dataloader = _Inner(inner._loader if type(inner) is _Inner else inner, see)
        return loader
    return _Ahead(loader, see)
