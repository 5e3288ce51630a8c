"""What commands that work something out have in common: tables on the terminal, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError

if TYPE_CHECKING:
    from frostline.simulator.tables import Table

__all__ = ["show", "write_json"]

# Columns of a file or a pipe, which has no edge at which a table would have to be cut.
_WIDE = 120


def show(title: str, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """Print them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    print(title)
    for table in tables:
        print(f"\n{table.caption}")
        shown = Shown(box=box.SIMPLE_HEAD)
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if i else "left", no_wrap=not i, overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
    for note in notes:
        print(f"note: {note}")


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write JSON values.

    Raises:
        ConfigError: ``path`` cannot be written.
    """
    import json

    try:
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
