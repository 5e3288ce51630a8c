"""What every test starts from: one thread, a fixed seed, a quiet Hugging Face, no network."""

from __future__ import annotations

import logging
import os
import re
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from frostline.cache.cost import Cost

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


MEASURED = Cost.numbers


class Stopwatch:
    """Moved on by ``sleep`` alone: what else a busy machine does takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def pytest_configure(config: pytest.Config) -> None:
    """Only tests that ask for a GPU (``-m gpu``) are shown one: the others are of what every machine has."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def _seed() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine reading a tiny model's records may take longer than computing them: only who asks is told."""
    monkeypatch.setattr(Cost, "numbers", lambda self: None)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """In the place of ``time.perf_counter``, for tests of where time goes."""
    found = Stopwatch()
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)
    return found
