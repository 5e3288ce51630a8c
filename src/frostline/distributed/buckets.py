"""What a data-parallel wrapper takes of memory beside the model, before there is one to ask.

DistributedDataParallel copies gradients into buckets to exchange them. The buckets are there from the moment when the
wrapper is built, beside the gradients and as large as these (``gradient_as_bucket_view=False``, as the Trainer has it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Buckets"]

# The copies in which it sends the weights round when it is built: 250 MiB each (its ``broadcast_bucket_size``), two at
# a time (``max_in_flight`` in torch's c10d/comm.cpp).
_COPIES = 2 * 250 * 1024**2


@dataclass(frozen=True)
class Buckets:
    """Bytes of a wrapper, beyond the buckets of what trains.

    Attributes:
        first: when it is built: buckets of all that trains before anything is frozen, or, before there are any, the
            copies in which it sends the weights round.
        asleep: buckets of what rests and stays in the wrapper all the same.
    """

    first: int
    asleep: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Buckets:
        """Those of a wrapper around ``model``, nothing of which is frozen yet."""
        weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        trains = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        return cls(max(trains, min(weights, _COPIES)))
