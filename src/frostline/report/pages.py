"""What every page has in common: its templates, and a file that is put in place whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from frostline.errors import FrostlineError

if TYPE_CHECKING:
    import jinja2

__all__ = ["put_in_place", "templates"]


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
