"""``frostline compare``: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: `frostline compare runs/trec-seed0 runs/trec-seed0/baseline`.")
    def compare(
        first: Annotated[Path, typer.Argument(metavar="A", help="A run's directory.", show_default=False)],
        second: Annotated[Path, typer.Argument(metavar="B", help="Another one's.", show_default=False)],
    ) -> None:
        """Print two runs side by side, and say why where their figures cannot be compared."""
        from rich.console import Console

        from frostline.report import compare as compare_runs

        comparison = compare_runs(first, second)
        Console().print(comparison.table())
        for warning in comparison.warnings:
            print(f"not comparable: {warning}")
