"""``frostline plan``: a table, JSON, and one line for every error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from frostline.simulator import read_profile
from tests.cli.test_cli import invoke
from tests.recipes.workbench import recipe_content, write_recipe_file

CLUSTER = {"device_memory": "1 GB", "between": {"bytes_per_second": 1e9}, "price_per_rank_hour": 3}


@pytest.fixture
def recipe(workbench: Path) -> Path:
    return write_recipe_file(workbench / "tiny.yaml", recipe_content(workbench))


def test_a_table_and_all_numbers(recipe: Path, tmp_path: Path) -> None:
    code, out, err = invoke("plan", recipe, "seed=3", "--json", tmp_path / "plan.json")
    assert code == 0, err
    assert "measuring" in err
    assert f"tiny: {recipe.parent / 'model'}, 4 blocks, 2 epochs of 96 samples, 8 a rank\n" in out
    assert "at depth 3\n" in out
    for expected in ("gradient-norm, slowest", "gradient-norm, fastest", "rank-hours", "1.00x", "--trajectory RUN"):
        assert expected in out
    header = next(line.split() for line in out.splitlines() if line.strip().startswith("policy"))
    assert header == ["policy", "cache", "time", "faster", "steps", "peak", "rank-hours"]
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["recipe"]["seed"] == 3
    assert [p["policy"] for p in found["predictions"]][0] == "none"
    for prediction in found["predictions"]:
        assert sum(stage["seconds"] for stage in prediction["stages"]) == pytest.approx(prediction["seconds"])
    assert read_profile(tmp_path / "plan.json").size == 4
    assert not (recipe.parent / "run").exists()


def test_ranks_price_and_a_trajectory(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "moves.yaml").write_text("[{samples: 48, depth: 3}]")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    arguments = ["plan", recipe, "--ranks", "2", "--trajectory", tmp_path / "moves.yaml", "--json", tmp_path / "p.json"]
    costs = {}
    for name, more in (
        ("cluster", ["--cluster", tmp_path / "cluster.yaml"]), ("link", ["--link", "1GB", "--price", "5"]),
    ):  # fmt: skip
        code, out, err = invoke(*arguments, *more)
        assert code == 0, err
        for expected in ("performance", "efficiency", "cost", "8 a rank, 2 ranks", "gradient-norm (sample: depth): 48"):
            assert expected in out
        plain = json.loads((tmp_path / "p.json").read_text())["predictions"][0]
        costs[name] = plain["cost"] / plain["rank_hours"]
    assert costs == {"cluster": pytest.approx(3.0), "link": pytest.approx(5.0)}


def test_help_teaches() -> None:
    code, out, _ = invoke("plan", "--help")
    assert code == 0
    for expected in ("frostline plan trec", "--trajectory runs/trec-seed0", "--link 1.25GB", "docs/plan.md"):
        assert expected in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonesuch"], "unknown recipe 'nonesuch'"),
        (["RECIPE", "freeze.policy=gradnorm"], "did you mean 'gradient-norm'"),
        (["RECIPE", "--ranks", "8"], "--ranks 8: give --cluster FILE or --link BYTES"),
        (["RECIPE", "--link", "fast"], "--link 'fast': write bytes a second"),
        (["RECIPE", "--link", "0"], "bytes_per_second"),
        (["RECIPE", "--link", "1GB", "--cluster", "RECIPE"], "give one of them"),
        (["RECIPE", "--price", "-1"], "--price: price_per_rank_hour=-1.0"),
        (["RECIPE", "--cluster", "NONE"], "cannot read the cluster"),
        (["RECIPE", "--trajectory", "NONE"], "cannot read the trajectory"),
        (["RECIPE", "data.source=NONE"], "NONE"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(recipe: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    places = {"RECIPE": recipe, "NONE": tmp_path / "none"}
    code, _, err = invoke("plan", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert expected in err
