"""The recipes that ship inside the package."""

from __future__ import annotations

from pathlib import Path

from frostline.errors import ConfigError, choices_message

__all__ = ["recipe_names", "recipe_path", "recipe_summary"]

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The file of a shipped recipe, or of a YAML file of the user's; :class:`ConfigError` where there is none."""
    shipped = _FOLDER / f"{name_or_path}.yaml"
    if name_or_path in recipe_names():
        return shipped
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    raise ConfigError(choices_message("recipe", name_or_path, recipe_names()) + ", or the path of a YAML file")


def recipe_summary(name_or_path: str) -> str:
    """The first line of a recipe's comment header: what it shows."""
    first = recipe_path(name_or_path).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
