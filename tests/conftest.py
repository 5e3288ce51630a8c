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

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seed() -> None:
    transformers.set_seed(0)
