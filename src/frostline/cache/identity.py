"""Which sample a row is: a hash of its own model inputs.

Nothing has to be plumbed through the data pipeline, so nothing that drops columns, shuffles, groups by length or
resumes can lose it, and an augmented or evaluated sample cannot be taken for another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.cache.passes import tensors_in
from frostline.trace import Call

__all__ = ["Rows", "bits", "identify", "is_packed", "precision_of"]

# Inputs of the head or of the decoder: they never reach the encoder's frost line, and labels of sequences are padded
# to their batch. (The self-check would find a model for which this is wrong.)
_BEYOND = ("label", "labels", "label_ids", "start_positions", "end_positions", "next_sentence_label",
           "num_items_in_batch", "return_loss")  # fmt: skip
# Marks of a batch in which all samples stand in one row.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class Rows:
    """The samples of one batch.

    Attributes:
        keys: 16 bytes for each row.
        real: ``[rows, tokens]`` bool on the CPU, which tokens are no padding; ``None`` where the model has no mask.
        padded: whether any is.
    """

    def __init__(self, keys: list[bytes], real: Tensor | None) -> None:
        self.keys, self.real = keys, real
        self.padded = real is not None and not bool(real.all())
        self._lengths: list[int] = []
        if real is not None:
            lengths = real.sum(1)
            # -1 where the real tokens do not stand together at the start (left padding).
            self._lengths = torch.where(real.long().cumprod(1).sum(1) == lengths, lengths, -1).tolist()

    def real_of(self, row: int) -> slice | Tensor:
        """Index of the real tokens of a row: a slice from the start where padding is on the right."""
        assert self.real is not None
        length = self._lengths[row]
        return slice(0, length) if length >= 0 else self.real[row]


def is_packed(call: Call) -> bool:
    """Whether a batch is flattened: several samples one after the other in a row, told apart by their positions."""
    tensors = tensors_in(call)
    if any(name.rpartition(".")[2] in _PACKED for name in tensors):
        return True
    positions = tensors.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.is_floating_point():
        return False
    steps = positions.diff(dim=1)
    # Left padding repeats a position at most once; a new sample falls back to the start.
    return bool((steps < -1).any()) if steps.numel() else False


def precision_of(call: Call) -> torch.dtype | None:
    """What autocast computes in while a model runs on these inputs; ``None`` without autocast."""
    kind = next(iter(tensors_in(call).values())).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def identify(call: Call, rows: int, *, padding_safe: bool, precision: torch.dtype | None) -> Rows:
    """Name the rows of a batch.

    Args:
        call: the arguments of the model.
        rows: samples in the batch.
        padding_safe: a sample's boundary activation does not depend on the padding beside it: real tokens alone
            name it. Else the padded length joins the name.
        precision: of autocast (:func:`precision_of`).
    """
    tensors = {n: t for n, t in tensors_in(call).items() if not _is_beyond(n)}
    own = {n: t.detach().cpu() for n, t in tensors.items() if t.dim() and t.shape[0] == rows}
    real = _real(own)
    settings = sorted((k, v) for k, v in call[1].items() if _is_setting(v) and not _is_beyond(k))
    shared = hashlib.blake2b(repr((settings, str(precision))).encode(), digest_size=16)
    for name in sorted(tensors.keys() - own.keys()):  # holds for all rows (positions given once)
        value = tensors[name].detach().cpu()
        shared.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        shared.update(bits(value))
    prefix = shared.digest()
    named = Rows([], real)
    whole = {n: np.ascontiguousarray(_array(t)) for n, t in sorted(own.items())}
    cut = {n for n, t in own.items() if real is not None and padding_safe and t.shape == real.shape}
    for row in range(rows):
        digest = hashlib.blake2b(prefix, digest_size=16)
        for name, values in whole.items():
            value = values[row]
            if name in cut:
                at = named.real_of(row)
                value = value[at if isinstance(at, slice) else at.numpy()]
            digest.update(f"{name}{value.shape}{own[name].dtype}".encode())
            digest.update(value.tobytes())
        named.keys.append(digest.digest())
    return named


def _real(own: Mapping[str, Tensor]) -> Tensor | None:
    mask = own.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return None
    return mask != 0


def _is_beyond(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _BEYOND or top.startswith(("decoder_", "labels_"))


def _is_setting(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def bits(value: Tensor) -> bytes:
    """The bits of a tensor on the CPU, row by row."""
    return _array(value).tobytes()


def _array(value: Tensor) -> np.ndarray[Any, Any]:
    """The bits of a tensor; numpy has no bfloat16."""
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
