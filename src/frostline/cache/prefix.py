"""The weights that records were made under: a name for them, and noticing that they have changed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from frostline.blocks import BlockStack
from frostline.cache.identity import bits

__all__ = ["PrefixDigest", "PrefixWatch"]


class PrefixDigest:
    """16 bytes that stand for every weight and buffer below a depth; they must be frozen when it is asked."""

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._known: dict[int, bytes] = {}

    def __call__(self, depth: int) -> bytes:
        if (known := self._known.get(depth)) is None:  # looked up once: another thread may forget it meanwhile
            digest = hashlib.blake2b(digest_size=16)
            for tensor in (*self._stack.prefix_parameters(depth).values(), *_buffers(self._stack, depth)):
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(bits(tensor.detach().cpu()))
            known = self._known[depth] = digest.digest()
        return known

    def forget(self, stack: BlockStack) -> None:
        """The weights of ``stack`` change, or another prefix of it has become known."""
        self._stack = stack
        self._known.clear()


class PrefixWatch:
    """Whether a weight or buffer below the frost line is what it was at the last look."""

    def __init__(self) -> None:
        self._prefix: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}
        self._versions: list[tuple[int, int]] = []

    def moved(self, stack: BlockStack, depth: int) -> None:
        """Another prefix is watched from the next look on."""
        buffers = _buffers(stack, depth)
        self._buffers = dict(enumerate(buffers))
        self._prefix = [*buffers, *stack.prefix_parameters(depth).values()]
        self._versions = []

    @property
    def looked(self) -> bool:
        """Whether anybody has looked at this prefix."""
        return bool(self._versions)

    def changed(self) -> bool:
        """Look; the first look at a prefix finds no change."""
        versions = [(tensor.data_ptr(), tensor._version) for tensor in self._prefix]
        if versions == self._versions:
            return False
        # DDP writes the buffers of rank 0 over all others' at each step: they have a new version, and the same values.
        different = [i for i, (a, b) in enumerate(zip(versions, self._versions, strict=False)) if a != b]
        same = all(i in self._buffers and torch.equal(self._buffers[i], self._prefix[i]) for i in different)
        first = not self._versions
        self._versions = versions
        self._buffers = {i: self._prefix[i].detach().clone() for i in self._buffers}
        return not (first or same)


def _buffers(stack: BlockStack, depth: int) -> list[Tensor]:
    return [buffer for module in stack.prefix_modules(depth) for buffer in module.buffers()]
