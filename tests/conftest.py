"""What every test starts from: one thread, a fixed seed, a quiet Hugging Face, no network."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
import transformers

from frostline.cache.cost import Cost

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


MEASURED = Cost.numbers


@pytest.fixture(autouse=True)
def _seed() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine reading a tiny model's records may take longer than computing them: only who asks is told."""
    monkeypatch.setattr(Cost, "numbers", lambda self: None)
