"""Plans are tested on the same tiny model and data as recipes are."""

from tests.recipes.conftest import _workbench, workbench

__all__ = ["_workbench", "workbench"]
