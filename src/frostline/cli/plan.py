"""``frostline plan``: what a recipe's run would take, from a few steps of its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.output import show, write_json
from frostline.cli.simulate import trajectory_at
from frostline.errors import ConfigError

if TYPE_CHECKING:
    from frostline.planning import Forecast
    from frostline.simulator import Cluster
    from frostline.simulator.tables import Table

__all__ = ["register"]

_EPILOG = """Examples:

`frostline plan trec` measures for some seconds on this machine, and predicts one process here.

`frostline plan trec freeze.policy=static freeze.depth=3 training.num_train_epochs=10` plans with other settings.

`frostline plan trec --trajectory runs/trec-seed0` takes the frost line of a run, for instance a short one.

`frostline plan trec --ranks 8 --link 1.25GB --price 2.5` predicts eight such machines, each with the recipe's batch.

`frostline plan trec --ranks 64 --cluster cluster.yaml --json plan.json` takes links, memory and price from a file.

The cluster's file is that of `frostline simulate`. docs/plan.md says what is measured, and what is left out.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=_EPILOG)
    def plan(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="key=value", help="Settings over the recipe's, as dotted YAML."),
        ] = None,
        trajectory: Annotated[
            Path | None, typer.Option(help="The frost line to plan with: a run, or a file.", show_default=False)
        ] = None,
        ranks: Annotated[int, typer.Option(help="Processes of the run, each with the recipe's batch.")] = 1,
        cluster: Annotated[
            Path | None, typer.Option(help="Links, memory and price of the ranks: a YAML file.", show_default=False)
        ] = None,
        link: Annotated[
            str | None,
            typer.Option(
                metavar="BYTES",
                help="What one link between two ranks carries in a second, as 1.25GB: in place of a file.",
                show_default=False,
            ),
        ] = None,
        price: Annotated[
            float | None, typer.Option(help="Of an hour of one rank; default: the cluster's.", show_default=False)
        ] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.", show_default=False)
        ] = None,
    ) -> None:
        """Measure a few steps of RECIPE's model on its data, and predict time, peak memory and cost of its run.

        Predicted are plain fine-tuning and the recipe's policy, each way with and without a cache and, on several
        ranks, with each packing. Where the policy decides on gradients, the slowest and the fastest course of its
        frost line are shown. Nothing is trained and nothing is kept.
        """
        machines = _cluster(ranks, cluster, link, price)
        line = trajectory_at(trajectory) if trajectory is not None else None
        from frostline.planning import forecast
        from frostline.recipes.schema import load_recipe

        found = forecast(load_recipe(recipe, overrides or []), ranks=ranks, cluster=machines, trajectory=line)
        show(_title(found), [_table(found, priced=price is not None or cluster is not None)], found.notes)
        if json_file is not None:
            write_json(json_file, found.numbers())


def _cluster(ranks: int, path: Path | None, link: str | None, price: float | None) -> Cluster:
    """What joins the ranks."""
    if path is not None and link is not None:
        raise ConfigError("--cluster and --link both say what joins the ranks: give one of them")
    if ranks > 1 and path is None and link is None:
        raise ConfigError(f"--ranks {ranks}: give --cluster FILE or --link BYTES: what joins them")
    from frostline.planning import ALONE
    from frostline.simulator import Cluster, read_cluster
    from frostline.simulator.files import validated

    if path is not None:
        found = read_cluster(path)
    elif link is not None:
        content = {"device_memory": _device_memory(), "between": {"bytes_per_second": _per_second(link)}}
        found = validated(Cluster, content, "--link")
    else:
        found = ALONE
    if price is None:
        return found
    return validated(Cluster, found.model_dump() | {"price_per_rank_hour": price}, "--price")


def _per_second(link: str) -> float:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return float(TypeAdapter(ByteSize).validate_python(link))
    except ValidationError:
        raise ConfigError(f"--link {link!r}: write bytes a second, as 1.25GB, 125MB or 1250000000") from None


def _device_memory() -> int:
    """Bytes of the device that is measured: the ranks are taken to have as much each."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _title(found: Forecast) -> str:
    from frostline.simulator.tables import duration

    ranks = f", {found.ranks:,} ranks" if found.ranks > 1 else ""
    measured = found.measured
    steps = ", ".join(
        f"{duration(seconds + measured.updates[depth])} at depth {depth}" for depth, seconds in measured.passes.items()
    )
    return (
        f"{found.recipe.name}: {found.recipe.model}, {found.profile.size} blocks, {found.epochs:g} epochs of "
        f"{found.samples_per_epoch:,} samples, {found.batch} a rank{ranks}\n"
        f"a step of {measured.rows} samples (mean of {measured.batches} batches): {steps}"
    )


def _table(found: Forecast, *, priced: bool) -> Table:
    """One row for each prediction."""
    from rich.filesize import decimal

    from frostline.simulator.tables import LABELS, Table, duration, money

    plain = found.predictions[0].simulation
    packed = found.ranks > 1
    rows = []
    for prediction in found.predictions:
        run = prediction.simulation
        rows.append(
            (
                prediction.policy,
                "yes" if prediction.cache else "no",
                *((LABELS[run.packing],) if packed else ()),
                duration(run.seconds),
                f"{plain.seconds / run.seconds:.2f}x",
                f"{run.steps:,}",
                decimal(prediction.peak),
                f"{run.rank_hours:.3g}",
                *((money(run.cost),) if priced else ()),
            )
        )
    columns = (
        "policy", "cache", *(("packing",) if packed else ()), "time", "faster", "steps", "peak", "rank-hours",
        *(("cost",) if priced else ()),
    )  # fmt: skip
    return Table("Predicted: training time, bytes at the peak of a step, and cost", columns, tuple(rows))
