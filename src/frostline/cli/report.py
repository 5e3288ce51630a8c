"""``frostline report``: a self-contained page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: `frostline report runs/trec-demo-seed0`, then open its report.html in a browser.")
    def report(run: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)]) -> None:
        """Write RUN/report.html: trajectory, the numbers behind each decision, loss, accuracy, where time went."""
        from frostline.report import write_report

        print(write_report(run))
