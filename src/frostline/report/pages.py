"""What pages have in common: sections and tables, templates, a file that is put in place whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frostline.errors import FrostlineError

if TYPE_CHECKING:
    import jinja2

    from frostline.report.plots import Plot

__all__ = ["Numbers", "Section", "put_in_place", "templates"]


@dataclass(frozen=True)
class Numbers:
    """A table of the page; every cell is text."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A heading, what the plot shows, the plot, and the tables with its numbers."""

    id: str
    title: str
    text: str
    plot: Plot | None
    tables: list[Numbers]


def templates(what: str) -> jinja2.Environment:
    """The templates of pages with plots.

    Raises:
        FrostlineError: the extra ``report`` is not installed; ``what`` begins the sentence that says so.
    """
    try:
        import jinja2
        import markupsafe

        import frostline.report.plots  # noqa: F401 (matplotlib)
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise FrostlineError(f"{what} {missing}: pip install 'frostline[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("frostline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # matplotlib escapes the text inside the SVG that it writes.
    environment.filters["svg"] = markupsafe.Markup
    return environment


def put_in_place(page: str, target: Path) -> None:
    """Write ``page``.

    Raises:
        FrostlineError: ``target`` cannot be written; what was there is still there.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, target)
    except OSError as error:
        raise FrostlineError(f"cannot write '{target}': {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
