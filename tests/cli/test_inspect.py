"""``frostline inspect``: the table, the JSON, and one line for every error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import (
    AlbertConfig,
    AlbertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from tests.cli.test_cli import invoke

SMALL = ("--batch", "2", "--length", "8")


def test_the_table_names_every_part(workbench: Path) -> None:
    code, out, err = invoke("inspect", workbench / "model", *SMALL)
    assert (code, err) == (0, "")
    first, *_ = out.splitlines()
    assert first == "BertForSequenceClassification: 4 blocks in 'bert.encoder.layer', batch 2 x 8 tokens"
    for expected in (
        "block 0",
        "block 3",
        "64 B",
        "stem: bert.embeddings",
        "head: never freezes: bert.pooler, classifier",
    ):
        assert expected in out
    assert "0: 1.00, 1: " in out


def test_json_holds_the_same(workbench: Path) -> None:
    code, out, _ = invoke("inspect", workbench / "model", *SMALL, "--json")
    assert code == 0
    found = json.loads(out)
    assert [part["name"] for part in found["parts"]] == ["stem", *(f"block {i}" for i in range(4)), "head"]
    assert found["parts"][1]["boundary_bytes_per_token"] == 64
    assert len(found["bounds"]) == 4


def test_memory_by_level_part_and_operation(workbench: Path) -> None:
    size = ("--batch", "32", "--length", "16", "--memory")
    code, out, _ = invoke("inspect", workbench / "model", *size)
    assert code == 0
    for expected in (
        "kept by part",
        "kept by operation",
        "slimfit",
        "published",
        "layer_norm",
        "gelu",
        "smaller by: safe ",
    ):
        assert expected in out
    code, out, _ = invoke("inspect", workbench / "model", *size, "--json")
    assert code == 0
    found = json.loads(out)
    sums = {kept["level"]: sum(sum(part.values()) for part in kept["parts"]) for kept in found["memory"]}
    assert list(sums) == ["off", "safe", "slimfit", "published", "max"]
    assert sums["max"] <= sums["slimfit"] < sums["safe"] < sums["off"]
    assert sums["off"] == sum(part["saved_bytes"] for part in found["parts"])


def test_in_a_narrow_terminal_numbers_keep_their_units(workbench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = invoke("inspect", workbench / "model", "--batch", "32", "--length", "16", "--memory")
    assert code == 0
    table = out[out.index("kept by part") : out.index("smaller by")].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert "…" not in "".join(table)
    rows = [line.split() for line in table if line.rstrip().endswith(("bytes", "kB", "MB"))]
    assert len(rows) > 10
    assert all(set(row[-9::2]) <= {"bytes", "kB", "MB"} for row in rows), "five sizes, each with its unit"


def test_models_that_are_not_for_text_and_decoders_load_too(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **size)).save_pretrained(tmp_path / "vit")
    code, out, _ = invoke("inspect", tmp_path / "vit", *SMALL)
    assert code == 0
    assert out.startswith("ViTForImageClassification: 3 blocks")
    assert "batch 2 samples" in out
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    code, out, _ = invoke("inspect", tmp_path / "gpt2", *SMALL)
    assert code == 0
    assert out.startswith("GPT2ForSequenceClassification: 3 blocks in 'transformer.h'")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonesuch"], "unknown asset 'nonesuch'"),
        (["digits"], "asset 'digits' is no model"),
        (["MODEL", "--blocks", "bert.encoder.layers"], "did you mean 'bert.encoder.layer'?"),
        (["MODEL", "--length", "99"], "length=99: BertForSequenceClassification has positions for at most 32 tokens"),
        (["MODEL", "--batch", "0"], "batch=0: must be at least 1"),
        (["EMPTY"], "no config.json"),
        (["ALBERT"], "a shared block cannot be frozen by depth"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], expected: str, workbench: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path / "albert")
    places = {"MODEL": workbench / "model", "EMPTY": tmp_path / "empty", "ALBERT": tmp_path / "albert"}
    code, out, err = invoke("inspect", *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert expected in err
    assert len(err.splitlines()) == 1
