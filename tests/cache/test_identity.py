"""A row is named by its own inputs, and by nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from frostline.cache.identity import identify, is_packed

IDS = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
MASK = (IDS > 0).long()


def names(safe: bool = True, **inputs: Any) -> list[bytes]:
    return identify(
        ((), inputs), len(next(v for v in inputs.values() if isinstance(v, Tensor))), padding_safe=safe, precision=None
    ).keys


def test_the_same_sample_in_another_batch_order_has_the_same_name() -> None:
    first = names(input_ids=IDS, attention_mask=MASK)
    again = names(input_ids=IDS.flip(0), attention_mask=MASK.flip(0))
    assert first == again[::-1]
    assert first[0] != first[1]


def test_padding_is_no_part_of_the_name_where_it_is_safe() -> None:
    wide = torch.nn.functional.pad(IDS, (0, 3))
    padded = {"input_ids": wide, "attention_mask": (wide > 0).long()}
    assert names(input_ids=IDS, attention_mask=MASK) == names(**padded)
    assert names(False, input_ids=IDS, attention_mask=MASK) != names(False, **padded)


def test_a_sample_without_padding_has_one_name_before_and_after_the_gate() -> None:
    full = {"input_ids": IDS[1:], "attention_mask": MASK[1:]}
    assert names(True, **full) == names(False, **full)


def test_everything_the_prefix_may_see_joins_the_name() -> None:
    base = names(input_ids=IDS, attention_mask=MASK)
    assert names(input_ids=IDS, attention_mask=MASK, token_type_ids=MASK) != base
    assert names(input_ids=IDS.int(), attention_mask=MASK) != base
    assert names(input_ids=IDS, attention_mask=MASK, position_ids=torch.arange(4)[None]) != base
    assert names(input_ids=IDS, attention_mask=MASK, scale=2.0) != base


def test_what_the_head_and_the_decoder_get_does_not() -> None:
    base = names(input_ids=IDS, attention_mask=MASK)
    beyond: dict[str, Any] = {"labels": torch.tensor([1, 2]), "decoder_input_ids": IDS, "num_items_in_batch": 7}
    assert names(input_ids=IDS, attention_mask=MASK, **beyond) == base


def test_masks_tell_samples_of_equal_ids_apart() -> None:
    ids = torch.tensor([[5, 6, 7, 7], [5, 6, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    first, second = names(input_ids=ids, attention_mask=mask)
    assert first != second


def test_pixels() -> None:
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = names(pixel_values=images)
    assert first == names(pixel_values=images.clone())
    images[0, 0, 0, 0] += 1e-3
    assert names(pixel_values=images)[0] != first[0]
    assert names(pixel_values=images)[1] == first[1]


@pytest.mark.parametrize(
    ("inputs", "packed"),
    [
        ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]])}, True),
        ({"input_ids": IDS, "position_ids": torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])}, False),  # left padding
        ({"input_ids": IDS, "position_ids": torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]])}, False),  # and filled with 1
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 3, 4])}, True),
        ({"input_ids": IDS, "attention_mask": MASK}, False),
    ],
)
def test_packed_batches(inputs: dict[str, Tensor], packed: bool) -> None:
    assert is_packed(((), inputs)) is packed
