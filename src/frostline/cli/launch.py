"""``frostline launch``: fine-tune as a recipe says, on several ranks, and pack what freezing frees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from frostline.packing import Entry

__all__ = ["register"]

_EPILOG = """Examples:

`frostline launch trec --nproc-per-node 2` trains on two processes of this host (one for each GPU).

`frostline launch trec --nproc-per-node 4 --pack efficiency pack.price=2.5` gives ranks back as the frost line rises.

`frostline launch trec --nproc-per-node 4 --pack performance pack.largest=8` takes larger batches instead.

`frostline launch trec --nproc-per-node 8 --nnodes 2 --rdzv-endpoint first-host:29400 --rdzv-id trec-1` on two hosts:
say the same on both; they share the output directory.

`frostline launch trec --nproc-per-node 4 resume=true` goes on after a stop.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=_EPILOG)
    def launch(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="key=value", help="Settings over the recipe's, as dotted YAML."),
        ] = None,
        per_host: Annotated[int, typer.Option("--nproc-per-node", help="Processes on each host.")] = 1,
        nodes: Annotated[str, typer.Option("--nnodes", metavar="N|MIN:MAX", help="Hosts.")] = "1",
        pack: Annotated[
            str | None,
            typer.Option(help="none, performance or efficiency (default: the recipe's pack.mode).", show_default=False),
        ] = None,
        endpoint: Annotated[
            str, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several hosts meet.")
        ] = "",
        name: Annotated[str, typer.Option("--rdzv-id", help="Of this launch, the same on all hosts.")] = "",
        max_restarts: Annotated[
            int, typer.Option(min=0, help="How often processes that died are started again, in each stage.")
        ] = 3,
    ) -> None:
        """Fine-tune as RECIPE says on several ranks, in stages: freezing frees memory, and packing spends it.

        `performance`: the ranks stay and their micro-batches grow, which is the shortest time. `efficiency`: the batch
        stays and moves to fewer ranks, which is the lowest cost; ranks that are freed end. A stage begins where the
        frost line has moved and the next stage fits into `pack.memory` and pays. Processes that die are started again
        from the stage's last checkpoint.
        """
        from rich.console import Console

        from frostline.launcher import Hosts
        from frostline.launcher import launch as run_launch
        from frostline.packing import account
        from frostline.recipes.schema import load_recipe

        given = [*(overrides or []), *([f"pack.mode={pack}"] if pack is not None else [])]
        hosts = Hosts.parse(per_host, nodes, endpoint, name)
        price = load_recipe(recipe, given).pack.price
        run = run_launch(recipe, given, hosts, max_restarts=max_restarts)
        if run is None:
            return
        Console().print(_table(account(run), price))
        print(f"model: {run / 'model'}")
        print(f"next: frostline report {run}")


def _table(entries: list[Entry], price: float | None) -> Table:
    """What each stage took of ranks, time and money."""
    from rich.table import Table

    from frostline.packing import cost_of

    table = Table("stage", "ranks", "batch", "seconds", "rank-hours", *(["cost"] if price is not None else []))
    named = [((str(one.stage), str(one.ranks), str(one.batch)), [one]) for one in entries]
    for (stage, ranks, batch), some in [*named, (("all", "", ""), entries)]:
        seconds, hours = sum(one.seconds for one in some), sum(one.rank_hours for one in some)
        cost = [f"{cost_of(some, price):.4g}"] if price is not None else []
        table.add_row(stage, ranks, batch, f"{seconds:.1f}", f"{hours:.4f}", *cost)
    return table
