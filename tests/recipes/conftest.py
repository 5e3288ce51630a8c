"""Fixtures shared by the tests of recipes, their runs and the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.recipes.workbench import make_data, make_model


@pytest.fixture(scope="session")
def _workbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workbench")
    make_model(root / "model")
    make_data(root / "data")
    return root


@pytest.fixture
def workbench(_workbench: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with ``model`` and ``data``."""
    for part in ("model", "data"):
        shutil.copytree(_workbench / part, tmp_path / part)
    return tmp_path
