"""What packing owes to the rest: to keep out of the way, and to notice what autograd would have noticed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["nothing_packed", "unchanged"]


def nothing_packed() -> AbstractContextManager[None]:
    """Inside of it autograd saves tensors as they are, whoever packs them outside."""
    context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach(), lambda tensor: tensor
    )
    return context


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, which was at ``version`` when the backward pass's need of it was known.

    Raises:
        RuntimeError: it has been written since. Autograd's own check does not see what stands in for a saved tensor.
    """
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place: it is at "
            f"version {tensor._version}, version {version} was saved"
        )
    return tensor
