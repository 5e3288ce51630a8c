"""Reading, checking and cutting labelled text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from frostline.errors import DataError
from frostline.tasks._quiet import quiet_datasets
from frostline.tasks.data import TextSpec, read_splits

ROWS = [{"text": f"text number {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(20)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows in the format that the suffix names; give the path as a recipe would."""
    names = list(rows[0]) if rows else ["text", "label"]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [separator.join(str(row[name]) for name in names) for row in rows]
        path.write_text("\n".join([separator.join(names), *lines]) + "\n", encoding="utf-8")
    return str(path)


def error_of(spec: TextSpec) -> str:
    with pytest.raises(DataError) as caught:
        read_splits(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    splits = read_splits(TextSpec(source=write(tmp_path / f"all{suffix}", ROWS)))

    assert list(splits) == ["train", "validation"]
    assert splits["train"].features["label"].names == ["even", "odd"]
    names = splits["train"].features["label"].names
    rows = [{"text": r["text"], "label": names[r["label"]]} for split in splits.values() for r in split]
    assert sorted(rows, key=lambda r: int(r["text"].split()[-1])) == ROWS


def test_a_folder_gives_its_splits_in_any_mixture_of_formats(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "dev.jsonl", ROWS[:4])
    write(tmp_path / "test.parquet", ROWS[4:9])

    splits = read_splits(TextSpec(source=str(tmp_path)))

    assert {split: len(rows) for split, rows in splits.items()} == {"train": 20, "validation": 4, "test": 5}
    assert splits["test"]["text"][0] == "text number 4"


def test_a_mapping_names_one_file_for_each_split(tmp_path: Path) -> None:
    source = {"train": write(tmp_path / "a.csv", ROWS), "test": write(tmp_path / "b.tsv", ROWS[:3])}
    assert {k: len(v) for k, v in read_splits(TextSpec(source=source)).items()} == {
        "train": 18,
        "validation": 2,
        "test": 3,
    }


def test_a_pair_of_texts_under_names_of_their_own(tmp_path: Path) -> None:
    rows = [{"premise": f"p{n}", "claim": f"c{n}", "gold": n % 3, "other": "x"} for n in range(9)]
    spec = TextSpec(
        source=write(tmp_path / "pairs.jsonl", rows),
        text_column="premise",
        text_pair_column="claim",
        label_column="gold",
        validation_fraction=0.3,
    )
    splits = read_splits(spec)
    assert splits["train"].column_names == ["text", "text_pair", "label"]
    assert len(splits["validation"]) == 3
    first = splits["train"][0]
    assert first["text"][1:] == first["text_pair"][1:]


def test_quoting_text_and_labels_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufefftext,label\n"one, ""two""\nthree",007\nNA,8\nnull,007\n', encoding="utf-8")
    splits = read_splits(TextSpec(source=str(path)))
    texts = {text for rows in splits.values() for text in rows["text"]}
    assert texts == {'one, "two"\nthree', "NA", "null"}
    assert splits["train"].features["label"].names == ["007", "8"]


def test_numbers_as_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": n} for n in (10, 2, 1, 10, 2)]
    names = read_splits(TextSpec(source=write(tmp_path / "t.jsonl", rows)))["train"].features["label"].names
    assert names == ["1", "2", "10"]


def test_limits_and_the_carved_split_follow_the_seed(tmp_path: Path) -> None:
    source = write(tmp_path / "t.csv", [{"text": f"t{n}", "label": n % 2} for n in range(200)])
    full = read_splits(TextSpec(source=source))
    assert (len(full["train"]), len(full["validation"])) == (180, 20)
    assert not set(full["train"]["text"]) & set(full["validation"]["text"])
    assert read_splits(TextSpec(source=source))["train"].to_dict() == full["train"].to_dict()
    other = read_splits(TextSpec(source=source, seed=1))
    assert set(other["validation"]["text"]) != set(full["validation"]["text"])

    small = read_splits(TextSpec(source=source, train_limit=10, validation_limit=5))
    large = read_splits(TextSpec(source=source, train_limit=30, validation_limit=500))
    assert (len(small["train"]), len(small["validation"]), len(large["validation"])) == (10, 5, 20)
    assert large["train"]["text"][:10] == list(small["train"]["text"]), "a smaller limit is a prefix of a larger one"
    assert set(small["train"]["text"]) <= set(full["train"]["text"])


def test_class_ids_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "rare" if n == 0 else "abc"[n % 3]} for n in range(100)]
    spec = TextSpec(source=write(tmp_path / "t.csv", rows), train_limit=5)
    assert read_splits(spec)["train"].features["label"].names == ["a", "b", "c", "rare"]


def test_nothing_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = read_splits(TextSpec(source=write(tmp_path / "t.csv", ROWS)))
    assert [rows.cache_files for rows in splits.values()] == [[], []]
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"text_column": "txt"}, "train: unknown column 'txt': did you mean 'text'? Valid choices: label, text"),
        ({"text_pair_column": "texts"}, "train: unknown column 'texts'"),
        ({"label_column": "labels"}, "train: unknown column 'labels': did you mean 'label'?"),
    ],
)
def test_an_unknown_column_lists_the_choices(tmp_path: Path, column: dict[str, str], said: str) -> None:
    assert error_of(TextSpec(source=write(tmp_path / "t.csv", ROWS), **column)).startswith(said)


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", "NaN"])
def test_missing_text_is_named_by_its_row(tmp_path: Path, value: object) -> None:
    source = write(tmp_path / "t.jsonl", [*ROWS[:2], {"text": value, "label": "odd"}])
    assert error_of(TextSpec(source=source)) == f"train: row 3 has no text in column 'text' (found {value!r})"


def test_missing_or_impossible_values_are_named_by_their_row(tmp_path: Path) -> None:
    for bad, said in [
        ({"text": "t"}, "train: row 3 has no label in column 'label' (found None)"),
        ({"label": "odd"}, "train: row 3 has no text"),
        ({"text": 5, "label": "odd"}, "train: row 3 has int 5 in column 'text', which must be text"),
        ({"text": "t", "label": 0.5}, "train: row 3 has float 0.5 in column 'label': a label is text or an integer"),
    ]:
        assert error_of(TextSpec(source=write(tmp_path / "t.jsonl", [*ROWS[:2], bad]))).startswith(said)
    path = tmp_path / "t.csv"
    path.write_text("text,label\na,1\n,2\n")
    assert error_of(TextSpec(source=str(path))).startswith("train: row 2 has no text")


def test_a_label_that_train_lacks_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", ROWS)
    other = write(tmp_path / "b.csv", [ROWS[0], {"text": "t", "label": "evn"}])
    for split in ("validation", "test"):
        said = error_of(TextSpec(source={"train": train, split: other}))
        assert said.startswith(
            f"{split}: row 2 has a label that train lacks: unknown label 'evn': did you mean 'even'?"
        )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"", "Empty CSV file"),
        ("t.csv", b"text,label\n", "train is empty"),
        ("t.jsonl", b"", "train is empty"),
        ("t.csv", b"text,label\na,1\nb,2,3\n", "Expected 2 columns, got 3"),
        ("t.csv", b"text,label\na,1\nb\n", "Expected 2 columns, got 1"),
        ("t.csv", b"text,label,text\na,1,b\n", "column 'text' is there twice"),
        ("t.csv", b"text,label\n\xff\xfe,1\nb,2\n", "invalid UTF8"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b', "line 2 is not JSON"),
        ("t.jsonl", b'["a", 1]\n', "line 1 is no JSON object"),
        ("t.jsonl", b"\xff\xfe", "'utf-8' codec can't decode"),
        ("t.parquet", b"not parquet", "cannot read"),
        ("t.xlsx", b"", "a data file ends in .csv, .tsv, .jsonl, .parquet"),
        ("t.csv", b"text,label\na,1\nb,1\n", "train has one class only ('1'): classification needs at least 2"),
    ],
)
def test_unreadable_and_useless_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in error_of(TextSpec(source=str(tmp_path / name)))


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    assert error_of(TextSpec(source=str(tmp_path / "no.csv"))).startswith("no such file or folder")
    assert error_of(TextSpec(source="data/no.csv")) == "no such file or folder: 'data/no.csv'"
    assert error_of(TextSpec(source={"train": "no.csv"})) == "no such file: 'no.csv'"
    assert "names no train file, only test" in error_of(TextSpec(source={"test": "no.csv"}))
    assert "no train file in" in error_of(TextSpec(source=str(tmp_path)))
    assert "did you mean 'trec'?" in error_of(TextSpec(source="trek"))
    assert "run `frostline fetch trec`" in error_of(TextSpec(source="trec"))
    assert "holds no text" in error_of(TextSpec(source="digits"))
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.tsv", ROWS)
    assert "has 2 train files (train.csv, train.tsv)" in error_of(TextSpec(source=str(tmp_path)))
    assert "only a hub data set has subsets" in error_of(TextSpec(source=str(tmp_path), subset="mrpc"))


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, name: str | None) -> None:
        raise ConnectionError(f"Couldn't reach {path!r}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = error_of(TextSpec(source="nobody/nothing"))
    assert said.startswith("'nobody/nothing' is no local path and cannot be had as a hub data set: Couldn't reach")


def glue_like() -> datasets.DatasetDict:
    """The schema of GLUE on the hub: classes declared in another order than the alphabet's, test without labels."""
    names = datasets.ClassLabel(names=["unlike", "alike"])
    features = datasets.Features(
        {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": names}
    )

    def split(labels: list[int]) -> datasets.Dataset:
        rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": label} for n, label in enumerate(labels)]
        return datasets.Dataset.from_list(rows, features=features)

    return datasets.DatasetDict(
        {"train": split([0, 1, 1, 0]), "validation_matched": split([1, 0]), "test": split([-1, -1])}
    )


def test_a_hub_data_set_keeps_its_classes_and_drops_an_unlabelled_test(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None) -> datasets.DatasetDict:
        asked.append((path, name))
        return glue_like()

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = TextSpec(source="nyu-mll/glue", subset="mrpc", text_column="sentence1", text_pair_column="sentence2")
    splits = read_splits(spec)
    assert asked == [("nyu-mll/glue", "mrpc")]
    assert list(splits) == ["train", "validation"]
    assert splits["train"].features["label"].names == ["unlike", "alike"]
    assert splits["train"]["label"][:] == [0, 1, 1, 0]
    assert "unknown column 'text'" in error_of(spec.model_copy(update={"text_column": "text"}))


def test_settings_are_checked() -> None:
    for wrong in ({"sourc": "trec"}, {"train_limit": 0}, {"validation_fraction": 1.0}, {"seed": -1}, {"source": ""}):
        with pytest.raises(ValidationError):
            TextSpec(**{"source": "trec", **wrong})  # type: ignore[arg-type]


def test_progress_bars_are_left_as_they_were() -> None:
    from datasets.utils.logging import is_progress_bar_enabled

    before = is_progress_bar_enabled()
    with quiet_datasets():
        assert not is_progress_bar_enabled()
    assert is_progress_bar_enabled() == before
