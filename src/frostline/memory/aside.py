"""Work of our own in the middle of a pass that is packed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["nothing_packed"]


def nothing_packed() -> AbstractContextManager[None]:
    """Inside of it autograd saves tensors as they are, whoever packs them outside."""
    context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach(), lambda tensor: tensor
    )
    return context
