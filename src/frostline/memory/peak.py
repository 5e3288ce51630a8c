"""The most memory that is alive at any moment, counted by storages: what a step really needs, not a sum of parts."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages while they live: those given at the start, and every one that an operation makes.

    What an operation needs inside of itself (a workspace, a copy that it drops before it returns) is not seen; what a
    GPU's allocator reports includes it.

    Args:
        present: tensors that are there already and stay countable (parameters, moments, a batch).
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for tensor in present:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def restart(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.now

    def forget(self, tensor: Tensor) -> None:
        """Do not count the storage of ``tensor`` any longer."""
        key = tensor.untyped_storage()._cdata
        if self._alive.pop(key, None) is not None:
            self.now -= tensor.untyped_storage().nbytes()

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        nbytes = storage.nbytes()

        def gone(reference: weakref.ref[Any]) -> None:
            if self._alive.get(key) is reference:
                del self._alive[key]
                self.now -= nbytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
