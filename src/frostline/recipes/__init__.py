"""Recipes: YAML descriptions of a whole fine-tuning run, the ones that ship, and the runner.

This package imports nothing heavy: :mod:`frostline.recipes.schema` validates (it needs transformers) and
:mod:`frostline.recipes.runner` runs.
"""

from __future__ import annotations

from frostline.recipes.library import recipe_names, recipe_path, recipe_summary

__all__ = ["recipe_names", "recipe_path", "recipe_summary"]
