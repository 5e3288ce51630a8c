"""From labelled text and a tiny real model to batches, metrics and a seeded head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from frostline.errors import ConfigError, ModelError
from frostline.tasks import assets
from frostline.tasks.classification import Prepared, compute_metrics
from frostline.tasks.data import TextSpec
from frostline.tasks.text_classification import build_model, prepare

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["red", "green", "blue", "a", "b", "c", "d"]
COLOURS = WORDS[:3]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny pre-trained BERT with a word-level tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def spec(tmp_path: Path) -> TextSpec:
    """Texts of 1 to 7 words whose first word is their class."""
    rows = [{"text": " ".join([COLOURS[n % 3], *"abcd"[: n % 7]]), "label": COLOURS[n % 3]} for n in range(40)]
    for split, part in (("train", rows), ("test", rows[:9])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return TextSpec(source=str(tmp_path))


@pytest.fixture
def prepared(spec: TextSpec, model_path: str) -> Prepared:
    return prepare(spec, model_path)


def test_rows_keep_their_length_and_batches_are_padded_to_their_own(prepared: Prepared) -> None:
    assert set(prepared.train.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert (len(prepared.train), len(prepared.validation)) == (36, 4)
    assert prepared.labels == ["blue", "green", "red"]
    assert prepared.test is not None
    # Row 0 is "red", row 2 "blue a b".
    assert prepared.test[0] == {
        "input_ids": [2, 4, 3],
        "token_type_ids": [0, 0, 0],
        "attention_mask": [1, 1, 1],
        "labels": 2,
    }
    batch = prepared.collator([prepared.test[0], prepared.test[2]])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 6, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [2, 0]


def test_long_texts_are_cut(spec: TextSpec, model_path: str) -> None:
    lengths = {len(row["input_ids"]) for row in prepare(spec, model_path, max_length=4).train}
    assert lengths == {3, 4}


def test_pairs_are_told_apart_by_token_types(tmp_path: Path, model_path: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("one\ttwo\tsame\n" + "red a\tred\tyes\nred\tblue b\tno\n" * 5)
    spec = TextSpec(source=str(path), text_column="one", text_pair_column="two", label_column="same")
    rows = prepare(spec, model_path).train
    by_label = {row["labels"]: row for row in rows}
    assert by_label[1]["input_ids"] == [2, 4, 7, 3, 4, 3]
    assert by_label[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_preparation_is_deterministic_and_leaves_no_files(spec: TextSpec, model_path: str, prepared: Prepared) -> None:
    again = prepare(spec, model_path)
    assert again.train.to_dict() == prepared.train.to_dict()
    assert again.validation.to_dict() == prepared.validation.to_dict()
    assert prepared.train.cache_files == []


def test_no_bar_and_no_report_is_shown(
    spec: TextSpec, model_path: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    build_model(prepare(spec, model_path), model_path, seed=0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    # The masked-language model has no pooler: that is not the head's business, so it is said once, by us.
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{model_path} lacks 2 weights, drawn at random: ['bert.pooler.dense.bias', 'bert.pooler.dense.weight']"
    ]


def test_the_head_follows_the_seed_and_the_backbone_the_checkpoint(prepared: Prepared, model_path: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_model(prepared, model_path, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is its own"

    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    stored = BertForMaskedLM.from_pretrained(model_path).bert.encoder.state_dict()
    for model in (first, other):
        assert all(torch.equal(value, stored[name]) for name, value in model.bert.encoder.state_dict().items())
    assert first.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert first.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert first(**prepared.collator([prepared.train[0]])).logits.shape == (1, 3)


def test_a_saved_model_loads_again_but_not_for_other_classes(
    prepared: Prepared, model_path: str, tmp_path: Path
) -> None:
    model = build_model(prepared, model_path, seed=3)
    model.save_pretrained(tmp_path / "saved")
    same = build_model(prepared, str(tmp_path / "saved"), seed=9)
    assert torch.equal(same.classifier.weight, model.classifier.weight)

    rows = [{"text": "red", "label": n % 2} for n in range(8)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = prepare(TextSpec(source=str(tmp_path / "two.jsonl")), model_path)
    with pytest.raises(ModelError, match=r"head for other classes than the 2 of the data \(0, 1\)"):
        build_model(two, str(tmp_path / "saved"), seed=0)


def test_models_that_cannot_be_had(spec: TextSpec, prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no Hugging Face model folder: it has no config.json"):
        prepare(spec, str(tmp_path))
    with pytest.raises(ModelError, match="asset 'trec' is no model; the models are: minilm, mpnet"):
        build_model(prepared, "trec", seed=0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="cannot load model"):
        build_model(prepared, str(tmp_path), seed=0)


@pytest.mark.parametrize("length", [2, 129])
def test_a_length_that_the_model_cannot_take_names_the_range(spec: TextSpec, model_path: str, length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length={length}: must be above 2 .* and at most 128"):
        prepare(spec, model_path, max_length=length)


def test_metrics_against_values_by_hand() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = np.array([0, 1, 1, 2])
    # Three of four right; F1 per class: 0 -> 2/3, 1 -> 2/3, 2 -> 1.
    for predictions in (logits, (logits, "hidden states")):
        metrics = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        assert metrics == pytest.approx({"accuracy": 0.75, "macro_f1": (2 / 3 + 2 / 3 + 1) / 3})


@pytest.mark.skipif(
    not (assets.is_fetched("minilm") and assets.is_fetched("trec")), reason="needs `frostline fetch minilm trec`"
)
def test_the_real_model_on_real_questions(caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepare(TextSpec(source="trec", train_limit=64, validation_limit=8, test_limit=8), "minilm")
    assert prepared.labels == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    lengths = {len(ids) for ids in prepared.train["input_ids"]}
    assert len(lengths) > 5, "minilm's own tokenizer file pads to 128: rows must keep their length"
    tokenizer: Any = prepared.processor
    assert tokenizer.decode(prepared.train[0]["input_ids"]).startswith("[CLS] ")

    with caplog.at_level(logging.WARNING):
        model = build_model(prepared, "minilm", seed=0)
    assert caplog.records == []
    loss = model(**prepared.collator([prepared.train[n] for n in range(8)])).loss
    # Near the loss of guessing among 6 classes, ln 6 = 1.79: a fresh head on a trained backbone.
    assert 1.5 < loss.item() < 2.1
