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
        host = self.codec.encode(hidden.detach()).cpu()
        taken = []
        for place, row in enumerate(rows):
            value = host[place]
            if self.unpadded and named.real is not None:
                value = value[named.real_of(row)]
            taken.append(store.put(named.keys[row], depth, value))
        return taken

    def join(
        self, records: Sequence[Record], rows: Sequence[int], named: Rows, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The records of ``rows`` as one tensor ``[len(rows), ...]``, padded to the batch with zeros."""
        first = records[0].value
        if self.unpadded and named.real is not None:
            joined = first.new_zeros((len(rows), named.real.shape[1], *first.shape[1:]))
            for place, (row, record) in enumerate(zip(rows, records, strict=True)):
                joined[place, named.real_of(row)] = record.value
        else:
            joined = torch.stack([record.value for record in records])
        return self.codec.decode(joined.to(device), dtype)
