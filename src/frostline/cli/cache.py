"""``frostline cache``: list, verify and remove the records that runs have left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

_Root = Annotated[Path | None, typer.Option("--folder", help="Where they are (default: in the user's cache).")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Boundary activations on disk (`cache.mode` disk or auto): list, verify, remove.",
        epilog="Records go when their run ends, unless `cache.keep=true` says otherwise or the run was killed.",
        no_args_is_help=True,
    )
    app.add_typer(group, name="cache")

    @group.command("ls")
    def list_folders(folder: _Root = None) -> None:
        """List the folders with records: size, whether a run uses them, and which model they belong to."""
        from frostline.cache.folders import folders

        root = _root(folder)
        found = list(folders(root))
        for entry in found:
            used = "in use" if entry.in_use else "left over"
            about = f"{entry.about.get('model', '?')}, opened {entry.about.get('opened', '?')}"
            print(f"{entry.path}  {entry.nbytes / 2**20:,.1f} MiB  {used}  {about}")
        if not found:
            print(f"no boundary activations in {root}")

    @group.command()
    def verify(folder: _Root = None) -> None:
        """Read every record and check it; exit code 1 where one is damaged. (A damaged record is never used.)"""
        from frostline.cache.folders import folders
        from frostline.cache.folders import verify as check

        damaged = 0
        for entry in folders(_root(folder)):
            if entry.in_use:
                print(f"{entry.path}: in use, not checked")
                continue
            sound, empty = check(entry.path)
            damaged += empty
            print(f"{entry.path}: {sound:,} records sound, {empty:,} slots without one")
        if damaged:
            raise typer.Exit(1)

    @group.command()
    def prune(
        folder: _Root = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    ) -> None:
        """Remove every folder that no run uses."""
        from frostline.cache.folders import folders, remove

        freed = 0
        for entry in folders(_root(folder)):
            if entry.in_use:
                print(f"kept {entry.path}: in use")
                continue
            if not dry_run:
                remove(entry)
            freed += entry.nbytes
            print(f"{'would remove' if dry_run else 'removed'} {entry.path}")
        print(f"{freed / 2**20:,.1f} MiB {'would be' if dry_run else ''} freed".replace("  ", " "))


def _root(folder: Path | None) -> Path:
    from frostline.cache.opening import activations_dir

    return folder if folder is not None else activations_dir()
