"""``frostline simulate``: what a run would take on a cluster that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.output import show, write_json
from frostline.errors import ConfigError

if TYPE_CHECKING:
    from frostline.simulator import Cluster, Course, Profile, Trajectory
    from frostline.simulator.tables import Table

__all__ = ["parse_ranks", "register", "trajectory_at"]

_EPILOG = """Examples:

`frostline inspect minilm --json > minilm.json` measures a profile; on the device that you ask about, on one of it.

`frostline simulate minilm.json runs/trec-seed0 cluster.yaml --batch 16 --plot curves.html` asks for 1 to 1,024 ranks.

`frostline simulate minilm.json runs/trec-seed0 cluster.yaml --batch 16 --ranks 64` shows the stages of one run.

`frostline simulate --published` fits the model to a published cluster, predicts its figures, and prints the error.

A cluster's file: `device_memory: 16 GiB`, `ranks_per_host: 8`, `between: {bytes_per_second: 1.25e9, latency_seconds:
5e-5}`, `inside: {bytes_per_second: 1e11}`, `price_per_rank_hour: 2.5`, `restart_seconds: 30`, `overlap: 0.5`.
docs/simulator.md describes the files and the model.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog=_EPILOG)
    def simulate(
        profile: Annotated[
            Path | None,
            typer.Argument(help="A model's: what `inspect --json` printed, or a YAML file.", show_default=False),
        ] = None,
        trajectory: Annotated[
            Path | None,
            typer.Argument(help="A run's directory, or a YAML or JSON file with moves.", show_default=False),
        ] = None,
        cluster: Annotated[
            Path | None, typer.Argument(help="Links, memory and price of the ranks: a YAML file.", show_default=False)
        ] = None,
        ranks: Annotated[str, typer.Option(help="Ranks at the start; `...` doubles.")] = "1,2,4,...,1024",
        batch: Annotated[
            int | None, typer.Option(help="Samples of a rank's micro-batch at the start.", show_default=False)
        ] = None,
        samples: Annotated[
            int | None, typer.Option(help="Samples in an epoch (default: what TRAJECTORY says).", show_default=False)
        ] = None,
        epochs: Annotated[
            float | None, typer.Option(help="Epochs (default: what TRAJECTORY says).", show_default=False)
        ] = None,
        cache: Annotated[
            bool, typer.Option("--cache", help="A sample's frozen prefix is computed once, then read for nothing.")
        ] = False,
        published: Annotated[
            bool, typer.Option("--published", help="Check the model against AutoFreeze's 64 GPUs instead.")
        ] = False,
        json_file: Annotated[
            Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.", show_default=False)
        ] = None,
        plot: Annotated[
            Path | None, typer.Option(metavar="FILE.html", help="Draw the curves there.", show_default=False)
        ] = None,
    ) -> None:
        """Predict steps, epochs, time and cost of a run on 1 to 1,024 ranks that are not there.

        Compared are a run with nothing frozen and the trajectory with each packing: none; performance (freezing frees
        memory for larger micro-batches: fewer steps); efficiency (the same global batch on fewer ranks). One
        ring all-reduce a step joins the ranks.
        """
        counts = parse_ranks(ranks)
        if plot is not None and plot.suffix != ".html":
            raise ConfigError(f"--plot {str(plot)!r}: the curves are a page, so its name must end with .html")
        from frostline.simulator.model import compare_packings
        from frostline.simulator.tables import published_tables, scaling_tables, stage_table

        numbers: dict[str, Any] = {}
        tables: list[Table] = []
        if published:
            if any(value is not None for value in (profile, trajectory, cluster, batch, samples, epochs)) or cache:
                raise ConfigError("--published brings its own files and settings: give --ranks, --json and --plot only")
            from frostline.simulator.published import check, setup

            found = check(setup())
            model, machines, course, rows = found.profile, found.cluster, found.setup.course, found.setup.batch
            numbers["published"] = found.numbers()
            tables += published_tables(found)
        else:
            model, machines, course, rows = _inputs(profile, trajectory, cluster, batch, samples, epochs)
        scaling = compare_packings(model, machines, course, ranks=counts, batch=rows, cache=cache)
        tables += scaling_tables(scaling)
        if len(counts) == 1:
            tables.append(stage_table(scaling[counts[0]]))
        title, notes = _title(model, machines, course, rows), _notes(model, machines, course, rows)
        show(title, tables, notes)
        if json_file is not None:
            runs = {str(n): {side: run.numbers() for side, run in sides.items()} for n, sides in scaling.items()}
            write_json(json_file, {**numbers, "batch": rows, "cache": cache, "notes": notes, "ranks": runs})
        if plot is not None:
            from frostline.report.simulation import write_simulation

            write_simulation(plot, title, scaling, tables, notes)
            print(f"curves: {plot}")


def parse_ranks(text: str) -> list[int]:
    """``"1,2,4,...,1024"`` as numbers, in order; ``...`` doubles the number before it up to the one behind."""
    words = [word.strip() for word in text.split(",")]
    found: list[int] = []
    try:
        for i, word in enumerate(words):
            if word == "...":
                end = int(words[i + 1])
                while 0 < 2 * found[-1] < end:
                    found.append(2 * found[-1])
            else:
                found.append(int(word))
    except (ValueError, IndexError):
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--ranks {text!r}: write numbers from 1 up, as 8 or 1,2,4 or 1,2,4,...,1024 (`...` doubles)")
    return sorted(set(found))


def _inputs(
    profile: Path | None,
    trajectory: Path | None,
    cluster: Path | None,
    batch: int | None,
    samples: int | None,
    epochs: float | None,
) -> tuple[Profile, Cluster, Course, int]:
    from frostline.simulator import read_cluster, read_profile

    if profile is None or trajectory is None or cluster is None:
        raise ConfigError("give the files PROFILE TRAJECTORY CLUSTER, or --published")
    if batch is None:
        raise ConfigError("give --batch: the samples of a rank's micro-batch at the start")
    course = trajectory_at(trajectory).course(samples, epochs)
    return read_profile(profile), read_cluster(cluster), course, batch


def trajectory_at(path: Path) -> Trajectory:
    """A run's, where ``path`` is its directory or its log or summary in it; else a file's."""
    from frostline.simulator import Trajectory, read_trajectory

    inside = path.name in ("events.jsonl", "summary.json") and (path.parent / "events.jsonl").is_file()
    if not path.is_dir() and not inside:
        return read_trajectory(path)
    from frostline.report import load_run
    from frostline.simulator.files import validated

    run = load_run(path.parent if inside else path)
    moves = [{"samples": point.samples, "depth": point.depth} for point in run.trajectory]
    plan = {key: run.plan.get(key) for key in ("samples_per_epoch", "epochs")}
    return validated(Trajectory, {"moves": moves, **plan}, f"trajectory of {str(run.path)!r}")


def _title(profile: Profile, cluster: Cluster, course: Course, batch: int) -> str:
    names = " on ".join(name for name in (profile.name, cluster.name) if name)
    run = f"{profile.size} blocks, {course.epochs:g} epochs of {course.samples_per_epoch:,} samples, {batch} a rank"
    return f"{names}: {run}" if names else run


def _notes(profile: Profile, cluster: Cluster, course: Course, batch: int) -> list[str]:
    """What would make the figures look better than freezing is, or other than the trajectory says."""
    from frostline.simulator.model import largest_batch

    notes = []
    most = largest_batch(profile, cluster, 0)
    if most > batch:
        notes.append(
            f"with nothing frozen {most:,} samples a rank would fit already, not {batch:,}: "
            "a part of what packing gains is not freezing's"
        )
    if course.late:
        notes.append(f"the run ends at sample {course.samples:,}: later moves are left out ({len(course.late)})")
    return notes
