"""The command line: ``frostline``. One file per subcommand; heavy libraries are imported inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from frostline import __version__
from frostline.cli import cache, compare, fetch, inspect, launch, plan, recipes, replay, report, run, simulate
from frostline.errors import FrostlineError

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Turns errors that a user can act on into one line and exit code 2, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FrostlineError as error:
            if os.environ.get("FROSTLINE_DEBUG") == "1":
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            print(f"\n{interrupt or 'stopped'}", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="frostline",
    cls=_Commands,
    help="Fine-tune pre-trained models for less: freeze leading blocks as they stop learning.",
    epilog="A first run: `frostline fetch minilm trec`, then `frostline run trec-demo`, then "
    "`frostline report runs/trec-demo-seed0`. FROSTLINE_DEBUG=1 shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"frostline {__version__}")
        raise typer.Exit


@app.callback()
def _frostline(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


fetch.register(app)
recipes.register(app)
inspect.register(app)
plan.register(app)
run.register(app)
launch.register(app)
report.register(app)
compare.register(app)
replay.register(app)
cache.register(app)
simulate.register(app)


def main() -> None:
    """Entry point of the ``frostline`` command."""
    app()
