"""What every table of ``table.py`` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["interval", "machine", "rows", "word"]


def rows(heads: Sequence[str], content: Iterable[Sequence[Any]]) -> Iterable[str]:
    """A table, line by line."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + " ---: |" * len(heads)
    for row in content:
        yield f"| {' | '.join(str(cell) for cell in row)} |"


def interval(ratio: dict[str, Any], digits: int = 3) -> list[str]:
    """Two cells: the median of a paired ratio and its interval."""
    low, high = ratio["interval"]
    return [f"{ratio['median']:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"]


def word(answer: bool) -> str:
    """A cell."""
    return "yes" if answer else "no"


def machine(report: dict[str, Any]) -> str:
    """The line below a table: where and how it was made."""
    found, packages = report["environment"], report["environment"]["packages"]
    device = found.get("gpu", "GPU") if report["device"].startswith("cuda") else found["processor"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{device}, {found['threads']} thread(s), {versions}, {report['date']}. Made with `{report['command']}`."
