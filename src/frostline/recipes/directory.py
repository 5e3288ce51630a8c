"""A run's directory: who may write into it, and putting things back when a run ends before it began."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from frostline.errors import ConfigError, ResumeError
from frostline.recipes.document import read_yaml
from frostline.recipes.schema import Recipe

__all__ = ["RunDirectory", "claimed_by", "write_recipe"]

# Names the launch that has claimed the directory, until the first training step is done.
_CLAIM = ".launch"
_PARTS = (
    _CLAIM,
    "recipe.yaml",
    "recipe.yaml.tmp",
    "model",
    "model.tmp",
    "events.jsonl",
    "stages.json",
    "stages.json.tmp",
    "launch.json",
    "summary.json",
    "summary.json.tmp",
    "report.html",
    "checkpoints",
    "baseline",
)
_ASIDE = ".replaced"

# What may differ between a run and its continuation: where and how it runs, not what it computes.
_MAY_DIFFER = frozenset({"name", "output_dir", "resume", "overwrite", "threads", "baseline", "pack.price"})


class RunDirectory:
    """Claims ``recipe.directory`` for a run.

    Until :meth:`commit` (the first training step is done) nothing is final: :meth:`abandon` takes away what was
    written, and brings back the run that ``overwrite=true`` put aside.

    Raises:
        ConfigError: the directory is in use, or cannot be written.
        ResumeError: ``resume=true`` without a run to continue, or with one of another recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.directory
        self._recipe = recipe
        self._created: list[Path] = []
        self._started = False
        self._committed = recipe.resume
        self._check_content()
        self._create()

    def _check_content(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={str(self.path)!r} is a file: choose a directory")
        try:
            used = self.path.is_dir() and any(self.path.iterdir())
        except OSError as error:
            raise ConfigError(f"output_dir={str(self.path)!r} cannot be read: {error.strerror}") from None
        stored = self.path / "recipe.yaml"
        if self._recipe.resume:
            if not stored.is_file():
                raise ResumeError(f"nothing to resume: {str(self.path)!r} holds no run; start it without resume=true")
            self._compare(stored)
        elif used and not self._recipe.overwrite:
            raise ConfigError(
                f"output_dir={str(self.path)!r} is not empty: overwrite=true replaces the run in it, resume=true "
                "continues it"
            )
        elif used and not any((self.path / part).exists() for part in ("recipe.yaml", _ASIDE, _CLAIM)):
            raise ConfigError(
                f"output_dir={str(self.path)!r} holds something else than a run (no recipe.yaml): it is not "
                "overwritten, choose another"
            )

    def _compare(self, stored: Path) -> None:
        # A run of an earlier version knows less sections: they were as the default is.
        defaults = {name: field.default for name, field in Recipe.model_fields.items()}
        sections = {name: d.model_dump(mode="json") for name, d in defaults.items() if isinstance(d, BaseModel)}
        trees = {**sections, **read_yaml(stored)}, self._recipe.model_dump(mode="json")
        there, here = (dict(_flat(tree)) for tree in trees)
        differences = [
            f"{key} is {here.get(key)!r}, there {there.get(key)!r}"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key) and not {key, key.split(".")[0]} & _MAY_DIFFER
        ]
        if differences:
            raise ResumeError(
                f"the run in {str(self.path)!r} has another recipe: {'; '.join(differences)}. Resume with the same "
                "settings, or start anew with overwrite=true"
            )

    def _create(self) -> None:
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._created = missing
            # Asking the file system is the only test that also sees read-only mounts and full disks.
            with tempfile.NamedTemporaryFile(dir=self.path) as probe:
                probe.write(b"0" * 4096)
                probe.flush()
        except OSError as error:
            self._created = [folder for folder in missing if folder.is_dir()]
            self._remove_created()
            raise ConfigError(f"output_dir={str(self.path)!r} cannot be written: {error.strerror}") from None

    def start(self, launch: str | None = None) -> None:
        """Put a run that is to be overwritten aside and write ``recipe.yaml``; claim the directory for ``launch``."""
        aside = self.path / _ASIDE
        if self._recipe.overwrite and not aside.is_dir():
            old = [self.path / part for part in _PARTS if (self.path / part).exists()]
            if old:
                aside.mkdir()
            for part in old:
                os.replace(part, aside / part.name)
        if not self._recipe.resume:
            # From here on everything that stands there is of the new run.
            self._started = True
            self._remove_parts()
            if launch is not None:  # first of all: who is killed now is known by it
                (self.path / _CLAIM).write_text(launch, encoding="utf-8")
        write_recipe(self._recipe, self.path)

    def commit(self) -> None:
        """Training has begun: what was put aside goes."""
        self._committed = True
        (self.path / _CLAIM).unlink(missing_ok=True)
        shutil.rmtree(self.path / _ASIDE, ignore_errors=True)

    def abandon(self) -> bool:
        """After an error: undo everything, if the run had not begun. Says whether it did."""
        if self._committed:
            return False
        if self._started:
            self._remove_parts()
        aside = self.path / _ASIDE
        if aside.is_dir():
            for part in aside.iterdir():
                os.replace(part, self.path / part.name)
            aside.rmdir()
        self._remove_created()
        return True

    def _remove_parts(self) -> None:
        for part in _PARTS:
            path = self.path / part
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _remove_created(self) -> None:
        for folder in self._created:
            try:
                folder.rmdir()
            except OSError:
                return


def claimed_by(folder: Path) -> str | None:
    """The launch that has claimed ``folder`` for a run whose first training step is not done; ``None``: no launch."""
    try:
        return (folder / _CLAIM).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write ``recipe.yaml`` with every setting; how the run was started (resume, overwrite) is no part of it."""
    content = recipe.model_dump(mode="json") | {"resume": False, "overwrite": False}
    temporary = folder / "recipe.yaml.tmp"
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, folder / "recipe.yaml")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
