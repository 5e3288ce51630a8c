"""``benchmarks/forecast.py`` on a tiny model: what is predicted and what is run are the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.forecast import main
from benchmarks.table import forecast as table

from tests.recipes.conftest import _workbench, workbench
from tests.recipes.workbench import recipe_content, write_recipe_file

__all__ = ["_workbench", "workbench"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_way_is_predicted_and_run(ranks: int, workbench: Path) -> None:
    recipe = write_recipe_file(workbench / "tiny.yaml", recipe_content(workbench))
    out = workbench / "forecast.json"
    arguments = [str(recipe), "training.logging_steps=4", "--depths", "0", "2", "--ranks", str(ranks)]
    assert main([*arguments, "--out", str(out)]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    (side,) = report["sides"]
    assert [(run["depth"], run["cache"]) for run in side["runs"]] == [(0, "off"), (2, "off"), (2, "memory")]
    for run in side["runs"]:
        assert run["steps"] == run["predicted_steps"] == 24 // ranks
        assert run["error"] == pytest.approx(run["predicted"] / run["seconds"] - 1)
        # Every sample once: in the second epoch. Of two ranks each counts its own.
        assert run["hits"] == (96 // ranks if run["cache"] == "memory" else 0)
        assert not run["limits"]
    assert (side["link"] is None) == (ranks == 1)
    assert report["met"] == all(abs(run["error"]) <= report["target"] for run in side["runs"])
    assert f"| {ranks} | 2 | memory |" in "\n".join(table(report))
