"""What autograd keeps in place of the tensors that it saves: packed once, unpacked whenever backward asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from frostline.memory.aside import unchanged
from frostline.memory.formats import Bits, Content, Format, Packed, Product
from frostline.memory.layout import contiguous_strides, in_memory_order
from frostline.memory.levels import Level
from frostline.memory.operations import Call, Role, cast_from, role_of

__all__ = ["Kept", "Ledger", "Shelf", "is_small"]

# Values below which packing saves less than it costs.
SMALL = 4096


def is_small(tensor: Tensor) -> bool:
    """Whether packing ``tensor`` would save less than it costs."""
    return tensor.numel() < SMALL


class Kept(Protocol):
    """What stands in autograd's graph for a saved tensor."""

    def restore(self) -> Tensor:
        """The tensor, or what is left of it."""


class Ledger(Protocol):
    """Is told of every saved tensor that takes memory of its own."""

    def __call__(self, operation: str, role: Role, nbytes: int) -> None:
        """``nbytes`` are kept that were not before; ``operation`` saved them."""


class _Raw:
    """The tensor itself, checked for changes in place."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Not the tensor that was given: where an operation saves its output, that would be a cycle through its node.
        self.tensor, self.version = tensor.detach(), tensor._version

    def restore(self) -> Tensor:
        return unchanged(self.tensor, self.version)


class _View:
    """Packed values, and the shape in which an operation saved them."""

    __slots__ = ("content", "shape", "strides")

    def __init__(self, content: Content, shape: torch.Size, strides: tuple[int, ...]) -> None:
        self.content, self.shape, self.strides = content, shape, strides

    def restore(self) -> Tensor:
        return self.content.restore().as_strided(self.shape, self.strides)


# Where values lie: a live storage, the offset in it, how many, of which type, and how often the storage was written.
_Place = tuple[int, int, int, torch.dtype, int]
_BITS = Bits()


class Shelf:
    """Packs what one forward pass saves.

    One tensor saved by several operations is packed once. It is known by its storage, of which a weak reference is
    held: an address alone is given to the next tensor as soon as this one dies.

    Args:
        level: what is kept in which format.
        parameters: the storages that are not activations are those of these tensors.
        ledger: is told what is saved and what is kept.
    """

    def __init__(self, level: Level, parameters: Iterable[Tensor], ledger: Ledger | None = None) -> None:
        self.level, self._ledger = level, ledger
        self._alive: dict[int, StorageWeakRef] = {}
        # Held, so that no number among them is given to another storage.
        self._parameters = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in parameters)}
        self._contents: dict[tuple[torch.dtype, Format, _Place], Content] = {}
        self._probabilities: dict[_Place, Content] = {}
        self._products: dict[_Place, Product] = {}
        self._raw: set[int] = set()
        self._noise: Content | None = None

    def pack(self, saved: Tensor, call: Call | None) -> Kept:
        """Keep ``saved``, which the operation ``call`` needs in the backward pass (``None``: it is not known)."""
        if not self._is_new(saved):
            return _Raw(saved)
        role, how = self._format(saved, call)
        return self._whole(saved, call, role) if how is None else self._packed(saved, call, role, how)

    def dropped(self, given: Tensor, out: Tensor, share: float) -> None:
        """Dropout made ``out`` of ``given``: where ``given`` are probabilities that are kept, ``out`` need not be."""
        noise, self._noise = self._noise, None
        if noise is None or not self._probabilities:
            return
        source = self._probabilities.get(_place(given))
        if source is None or not given.is_contiguous() or not out.is_contiguous():
            return
        self._hold(out.untyped_storage())
        self._products[_place(out)] = Product(source, noise, 1.0 / (1.0 - share))

    def beside(self, tensor: Tensor, call: Call | None) -> None:
        """An operation that takes another's place keeps ``tensor`` itself, as it is: a mask of attention, say."""
        if self._is_new(tensor):
            self._all_of(tensor.untyped_storage(), call, Role.EXACT)

    def clear(self) -> None:
        """Forget what was saved: the backward pass has it, and the next pass saves anew."""
        self._contents.clear()
        self._probabilities.clear()
        self._products.clear()
        self._raw.clear()
        self._alive.clear()
        self._noise = None

    # -- inside -------------------------------------------------------------------------------------

    def _format(self, saved: Tensor, call: Call | None) -> tuple[Role, Format | None]:
        if is_small(saved) or _repeats(saved):
            return Role.EXACT, None
        if saved.dtype == torch.bool:
            return Role.NOISE, _BITS if self.level.masks else None
        if call is None:
            return Role.EXACT, None
        if not saved.is_floating_point():  # codes are packed already
            return Role.ACTIVATION if call.name in ("gelu", "silu") else Role.EXACT, None
        role = role_of(call, saved)
        return role, self.level.format_of(role, call, saved)

    def _packed(self, saved: Tensor, call: Call | None, role: Role, how: Format) -> Kept:
        values, strides = in_memory_order(saved.detach())
        if strides is None:  # with gaps: nobody else has these values
            content: Content = Packed(how, values)
            self._tell(call, role, content.nbytes)
            return _View(content, saved.shape, contiguous_strides(saved.shape))
        origin = cast_from(call, saved, role)
        if origin is None:
            origin = saved
        place = _place(origin)
        # A product is known by the place of what dropout made, which autocast may have cast since.
        known: Content | None = self._products.get(place) if self._products and origin is saved else None
        known = known or self._contents.get((saved.dtype, how, place))
        if known is None:
            known = self._contents[saved.dtype, how, place] = Packed(how, values)
            self._hold(origin.untyped_storage())
            self._tell(call, role, known.nbytes)
        if role is Role.NOISE and call is not None and call.name == "dropout":
            self._noise = known
        elif role is Role.PROBABILITIES:
            self._probabilities[place] = known
        return _View(known, saved.shape, strides)

    def _whole(self, saved: Tensor, call: Call | None, role: Role) -> Kept:
        """Keep a tensor as it is; a small piece of a large one is copied, so that it does not hold all of it."""
        storage, nbytes = saved.untyped_storage(), saved.numel() * saved.element_size()
        held = storage.nbytes()
        if self.level.slices and 2 * nbytes < held and not _repeats(saved):
            self._tell(call, role, nbytes)
            return _Raw(saved.detach().clone())
        self._all_of(storage, call, role)
        return _Raw(saved)

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether keeping ``tensor`` takes memory that neither parameters nor what is kept as it is hold anyway."""
        if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False  # sparse, jagged, or (vmap) without a storage: not known
        storage = tensor.untyped_storage()._cdata
        return storage not in self._parameters and storage not in self._raw

    def _all_of(self, storage: torch.UntypedStorage, call: Call | None, role: Role) -> None:
        self._hold(storage)
        self._raw.add(storage._cdata)
        self._tell(call, role, storage.nbytes())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Whatever becomes of ``storage``: its number is given to no other until :meth:`clear`."""
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _tell(self, call: Call | None, role: Role, nbytes: int) -> None:
        if self._ledger is not None:
            self._ledger(call.name if call is not None else "other", role, nbytes)


def _place(tensor: Tensor) -> _Place:
    storage = tensor.untyped_storage()._cdata
    return storage, int(tensor.storage_offset()), tensor.numel(), tensor.dtype, tensor._version


def _repeats(tensor: Tensor) -> bool:
    """Whether values stand for several (an expanded tensor): it is large in shape only."""
    return not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
