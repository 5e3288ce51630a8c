"""``frostline recipes``: list, show and copy the recipes that ship."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from frostline.errors import ConfigError
from frostline.recipes import recipe_names, recipe_path, recipe_summary

__all__ = ["register"]

_Name = Annotated[str, typer.Argument(help="A recipe that `frostline recipes list` names.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="List, show and copy recipes: YAML files that describe a whole run.",
        epilog="Example: `frostline recipes copy trec mine.yaml`, edit it, `frostline run mine.yaml`.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="recipes")

    @group.command("list")
    def list_recipes() -> None:
        """List the recipes that ship with Frostline."""
        width = max(len(name) for name in recipe_names())
        for name in recipe_names():
            print(f"{name:<{width}}  {recipe_summary(name)}")

    @group.command()
    def show(name: _Name) -> None:
        """Print a recipe: every setting can be overridden as key=value of `frostline run`."""
        print(recipe_path(name).read_text(encoding="utf-8"), end="")

    @group.command()
    def copy(
        name: _Name,
        destination: Annotated[
            Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder; default: NAME.yaml here.")
        ] = None,
    ) -> None:
        """Copy a recipe to edit it."""
        source = recipe_path(name)
        target = destination or Path()
        if target.is_dir():
            target = target / source.name
        if target.exists():
            raise ConfigError(f"{str(target)!r} exists already: choose another name")
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigError(f"cannot write {str(target)!r}: {error.strerror}") from None
        print(target)
