"""``frostline replay``: what another policy would have decided on a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frostline.errors import ConfigError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Example: `frostline replay runs/trec-seed0 --policy gradient-norm --percentile 75`. Every option but "
        "`--policy` is one of the policy's own.",
    )
    def replay(
        context: typer.Context,
        run: Annotated[Path, typer.Argument(help="A run's directory.", show_default=False)],
        policy: Annotated[str, typer.Option("--policy", help="The policy to ask.")] = "gradient-norm",
    ) -> None:
        """Print the trajectory that a policy would have taken on a run's numbers, until it first differs."""
        options = parse_options(context.args)
        from frostline.report import replay as replay_run

        print(replay_run(run, policy, options).render())


def parse_options(words: list[str]) -> dict[str, Any]:
    """``["--percentile", "75", "--first-active=true"]`` as ``{"percentile": 75, "first_active": True}``."""
    from frostline.recipes.document import parse_yaml

    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise ConfigError(f"{word!r}: write the policy's options as --name value, for instance --percentile 75")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{name} has no value: write {name} VALUE")
            value = rest.pop(0)
        options[name[2:].replace("-", "_")] = parse_yaml(value, name)
    return options
