"""Batches as a run sees them: real texts, tokenised by the model's own tokenizer, padded to the longest of them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from frostline.tasks.assets import resolve

__all__ = ["CLASSES", "Batch", "base_model", "load_model", "made_up_batch", "real_batch"]

CLASSES = 6


@dataclass(frozen=True)
class Batch:
    """``inputs`` are what the model takes; the rest describes them. ``lengths`` are real tokens of each row."""

    data: str
    rows: int
    length: int
    lengths: list[int]
    inputs: dict[str, torch.Tensor]

    def numbers(self) -> dict[str, Any]:
        """JSON values: everything but the tensors."""
        return {key: value for key, value in asdict(self).items() if key != "inputs"}


def load_model(name: str, seed: int, device: str) -> tuple[torch.nn.Module, Any]:
    """The classifier ``name`` (asset, folder or hub id) in fp32, its head drawn from ``seed``, and its tokenizer."""
    import transformers

    path = resolve(name)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=CLASSES, dtype=torch.float32
    )
    return network.to(device), tokenizer


def base_model(seed: int, device: str) -> torch.nn.Module:
    """A classifier of BERT-base's shape with random weights, in fp32: for time and memory, not for accuracy."""
    import transformers

    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=CLASSES)).to(device)


def real_batch(tokenizer: Any, data: str, rows: int, length: int, seed: int, device: str) -> Batch:
    """``rows`` random training texts of the fetched asset ``data``, cut at ``length`` tokens.

    Raises:
        DataError: the asset is not fetched.
    """
    with (Path(resolve(data)) / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    chosen = random.Random(seed).sample(texts, rows)
    inputs = dict(tokenizer(chosen, truncation=True, max_length=length, padding=True, return_tensors="pt"))
    return _batch(data, inputs, seed, device)


def made_up_batch(vocabulary: int, rows: int, length: int, seed: int, device: str) -> Batch:
    """Random tokens in rows of random lengths, the longest of them ``length``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator) * mask
    return _batch("made up", {"input_ids": ids, "attention_mask": mask}, seed, device)


def _batch(data: str, inputs: dict[str, torch.Tensor], seed: int, device: str) -> Batch:
    rows, length = inputs["input_ids"].shape
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    labels = torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))
    inputs = {**inputs, "labels": labels}
    return Batch(data, rows, length, lengths, {name: value.to(device) for name, value in inputs.items()})
