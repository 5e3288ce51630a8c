"""``frostline run``: fine-tune as a recipe says."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["register"]

_EPILOG = """Examples:

`frostline run trec-demo` runs a shipped recipe; `frostline run mine.yaml` one of yours.

`frostline run trec freeze.percentile=75 seed=1 baseline=full` overrides settings, and runs plain fine-tuning too.

`frostline run trec freeze.policy=static freeze.depth=3` takes another policy.

`frostline run trec freeze.policy=interlayer memory.level=slimfit` is SlimFit: layers take turns, compressed.

`frostline run trec resume=true` goes on after a stop; `overwrite=true` starts again.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=_EPILOG)
    def run(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="key=value", help="Settings over the recipe's, as dotted YAML."),
        ] = None,
    ) -> None:
        """Fine-tune as RECIPE says, and leave model, events and summary in its output directory.

        The output directory is `runs/NAME-seedN` unless `output_dir` says otherwise. Policies: gradient-norm
        (AutoFreeze), static, ramp, random-blocks (LISA), interlayer (SlimFit), none.
        """
        from rich.console import Console

        from frostline.clock import process_start
        from frostline.recipes.runner import run as run_recipe
        from frostline.recipes.schema import load_recipe
        from frostline.report import compare

        result = run_recipe(load_recipe(recipe, overrides or []), started=process_start())
        console = Console()
        if result.baseline is not None:
            comparison = compare(result.directory, result.directory / "baseline")
            console.print(comparison.table())
            for warning in comparison.warnings:
                print(f"not comparable: {warning}")
        else:
            print(_in_short(result.summary))
        print(f"model: {result.directory / 'model'}")
        print(f"next: frostline report {result.directory}")


def _in_short(summary: dict[str, object]) -> str:
    """A finished run in three lines."""
    from frostline.events import TRAINING_PHASES
    from frostline.summary import Summary

    split, scores = ("test", summary["test"]) if summary["test"] else ("validation", summary["metrics"])
    seconds = summary["seconds"]
    assert isinstance(scores, dict)
    assert isinstance(seconds, dict)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    training = sum(seconds[phase] for phase in TRAINING_PHASES)
    return f"{Summary(summary)}\n{split}: {shown}\n{training:.1f} s training, {seconds['total']:.1f} s in all"
