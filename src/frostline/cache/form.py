"""What a record looks like: of which tokens, in which codec; and batches taken apart into records and put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frostline.cache.codecs import Codec
from frostline.cache.identity import Rows
from frostline.cache.store import Record, Store

__all__ = ["Form"]


class Form:
    """How boundary activations are kept.

    Attributes:
        unpadded: a record holds its sample's real tokens only.
        codec: how their values are written.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec, self.unpadded = codec, False

    def keep(self, store: Store, hidden: Tensor, rows: Sequence[int], named: Rows, depth: int) -> list[bool]:
        """Hand the boundary activations ``[len(rows), ...]`` of some rows to a store, and say which it has taken."""
        kept = self.codec.encode(hidden.detach()).to(store.device)
        taken = []
        for place, row in enumerate(rows):
            value = kept[place]
            if self.unpadded and named.real is not None:
                value = value[named.real_of(row)]
            taken.append(store.put(named.keys[row], depth, value))
        return taken

    def join(
        self, records: Sequence[Record], rows: Sequence[int], named: Rows, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The records of ``rows`` as one tensor ``[len(rows), ...]``, padded to the batch with zeros."""
        first = records[0].value
        real = named.real if self.unpadded else None
        shape = first.shape if real is None else (real.shape[1], *first.shape[1:])
        # Record by record to where they are needed: from pinned memory, or from the GPU's own, nothing is waited for.
        joined = (torch.empty if real is None else torch.zeros)((len(rows), *shape), dtype=first.dtype, device=device)
        for place, (row, record) in enumerate(zip(rows, records, strict=True)):
            at = slice(None) if real is None else named.real_of(row)
            if isinstance(at, slice):
                # What is not pinned may be gone before a copy that nobody waits for; a pinned slot is written over only
                # after `keep` has waited for this device.
                ready = device.type == "cuda" and (record.value.is_cuda or record.value.is_pinned())
                joined[place, at].copy_(record.value, non_blocking=ready)
            else:
                joined[place, at.to(device)] = record.value.to(device)
        return self.codec.decode(joined, dtype)
