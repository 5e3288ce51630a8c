"""A tiny BERT, a word-level tokenizer and a small labelled data set on disk, and recipes over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

BLOCKS = 4
TOPICS = {
    "sea": ["wave", "ship", "salt", "tide"],
    "sky": ["cloud", "bird", "wind", "star"],
    "soil": ["root", "clay", "worm", "seed"],
}
FILLER = ["the", "a", "of", "on", "in", "and", "by", "near"]
ROWS = {"train": 96, "validation": 24, "test": 24}


def make_model(folder: Path, *, width: int = 16) -> Path:
    """An ordinary Hugging Face folder, without a classification head."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=width, num_hidden_layers=BLOCKS, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=32,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_data(folder: Path) -> Path:
    """``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``: the topic of a few words."""
    folder.mkdir()
    draw = random.Random(0)
    for split, rows in ROWS.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for row in range(rows):
                label = list(TOPICS)[row % len(TOPICS)]
                words = draw.choices(FILLER, k=draw.randint(2, 8)) + draw.choices(TOPICS[label], k=2)
                draw.shuffle(words)
                file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return folder


def recipe_content(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over the two: 2 epochs of 12 steps, a decision every 3, 2 checkpoints inside each epoch."""
    content: dict[str, Any] = {
        "task": "text-classification",
        "model": str(root / "model"),
        "data": {"source": str(root / "data")},
        "max_length": 24,
        "freeze": {"policy": "gradient-norm", "percentile": 60, "evaluations_per_epoch": 4},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "save_strategy": "steps",
            "save_steps": 5,
            "save_total_limit": 10,
            "logging_steps": 4,
        },
        "output_dir": str(root / "run"),
    }
    return content | changes


def write_recipe_file(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path
