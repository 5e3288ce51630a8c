"""Reading one table from a CSV, TSV, JSONL or Parquet file, strictly: what is malformed is an error, not a guess."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from frostline.errors import DataError

__all__ = ["SUFFIXES", "read_table"]


Table = tuple[dict[str, list[Any]], dict[str, list[str]]]


def read_table(path: Path) -> Table:
    """The columns of a file, and the names of the classes that a column counts where the file declares them.

    CSV and TSV (header first, UTF-8) give strings; the others what is stored. Only Parquet files that ``datasets``
    wrote declare classes.

    Raises :class:`DataError` for a file that is missing, empty, of another format, or malformed.
    """
    if path.suffix.lower() not in _READERS:
        raise DataError(f"cannot read {str(path)!r}: a data file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"no such file: {str(path)!r}")
    try:
        return _READERS[path.suffix.lower()](path)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error


def _delimited(delimiter: str) -> Callable[[Path], Table]:
    def read(path: Path) -> Table:
        parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        # One block for the header alone, so that every column can then be asked for as text ("007" is a label).
        with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
            names = reader.schema.names
        _check_names(names, path)
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, quoted_strings_can_be_null=False
        )
        table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
        return _columns(table), {}

    return read


def _parquet(path: Path) -> Table:
    table = pyarrow.parquet.read_table(path)
    _check_names(table.column_names, path)
    return _columns(table), _declared_classes(table.schema)


def _declared_classes(schema: pa.Schema) -> dict[str, list[str]]:
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features

    features = Features.from_arrow_schema(schema)
    return {name: list(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _check_names(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"cannot read {str(path)!r}: column {twice[0]!r} is there twice")


def _columns(table: pa.Table) -> dict[str, list[Any]]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"cannot read {str(path)!r}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"cannot read {str(path)!r}: line {number} is no JSON object")
            rows.append(row)
    # A key that some rows lack is a missing value there, reported with its row by whoever needs the column.
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, {}


_READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
