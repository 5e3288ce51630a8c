"""``benchmarks/cache.py`` on a tiny model: it measures hits, and says so."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from benchmarks.batches import made_up_batch
from benchmarks.cache import TIERS, measure
from benchmarks.table import cache
from transformers import BertConfig, BertForSequenceClassification

from frostline.cache import cache_options


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_every_timed_step_is_read_from_the_cache(tier: str) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32, num_labels=6,
        )
    )  # fmt: skip
    options = Namespace(rounds=2, seed=0, device="cpu", tier=tier, base=False)
    found = measure(model, [made_up_batch(64, 4, 8, seed, "cpu") for seed in range(2)], options)
    assert [row["depth"] for row in found["depths"]] == [1, 2]
    for row in found["depths"]:
        assert row["cache"]["hits"] == row["cache"]["misses"] == row["cache"]["written"] == 8
        assert row["ratio"]["pairs"] == 2
        assert min(min(values) for values in row["samples"].values()) > 0
    machine = {"processor": "a processor", "threads": 1, "packages": {"torch": "1"}}
    report = {
        "model": "tiny",
        "device": "cpu",
        "date": "today",
        "command": "make",
        "environment": machine,
    }
    for each in TIERS:
        assert "| 2 |" in "\n".join(cache({**report, "tier": each, "shapes": [found]}))
    assert cache_options(TIERS["device"]).device > 0
