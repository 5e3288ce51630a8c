"""Two runs side by side: every figure, and when figures may not be compared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from frostline.report import compare, load_run
from tests.report.sample import ENVIRONMENT, RECIPE, write_run


def rows(comparison: Any) -> dict[str, tuple[str, str]]:
    return {row.label: (row.first, row.second) for row in comparison.rows}


def test_every_figure_of_a_run_and_its_baseline(tmp_path: Path) -> None:
    path = write_run(tmp_path / "mine", baseline=True)
    run, base = load_run(path), load_run(path / "baseline")
    comparison = compare(path, path / "baseline")
    assert comparison.names == ("mine", "mine/baseline")
    assert comparison.warnings == ()
    training = f"{base.training_seconds / run.training_seconds:.2f}x"
    total = f"{base.seconds['total'] / run.seconds['total']:.2f}x"
    assert rows(comparison) == {
        "policy": ("gradient-norm (percentile=50.0, evaluations_per_epoch=5)", "none"),
        "model": ("minilm · BertForSequenceClassification",) * 2,
        "status": ("finished", "finished"),
        "validation accuracy": ("0.9400", "0.9450"),
        "validation loss": ("0.2250", "0.2250"),
        "test accuracy": ("0.9400", "0.9450"),
        "test f1": ("0.9300", "0.9350"),
        "test loss": ("0.2100", "0.2100"),
        "training seconds": (f"{run.training_seconds:.1f}", "40.0"),
        "total seconds": (f"{run.seconds['total']:.1f}", "54.0"),
        "training speed-up over mine/baseline": (training, "1.00x"),
        "total speed-up over mine/baseline": (total, "1.00x"),
        "final depth (blocks frozen)": ("5 of 6", "0"),
        "trajectory (depth from sample)": (
            "0 from 0, 1 from 960, 2 from 1,280, 3 from 1,600, 4 from 1,920, 5 from 2,240", "0 from 0",
        ),
        "decisions": ("20", "0"),
        "optimizer steps": ("400", "400"),
        "seed": ("3", "3"),
        "machine": ("Test CPU, cores 2, threads 1",) * 2,
        "versions": ("python 3.11.7, frostline 0.1.0, torch 2.13.0, transformers 5.23.0",) * 2,
    }  # fmt: skip
    assert 1.6 < float(training[:-1]) < 1.75


def test_the_speed_up_is_over_plain_fine_tuning_wherever_it_stands(tmp_path: Path) -> None:
    path = write_run(tmp_path / "mine", baseline=True)
    swapped = rows(compare(path / "baseline", path))
    assert swapped["training speed-up over mine/baseline"] == ("1.00x", "1.68x")


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"seed": 4}, "different seed: 3 and 4"),
        ({"environment": {**ENVIRONMENT, "cores": 64}}, "different machine, cores: 2 and 64"),
        ({"environment": {**ENVIRONMENT, "gpu": "H100"}}, "different machine, gpu: - and H100"),
        ({"environment": {**ENVIRONMENT, "packages": {"frostline": "0.1.0", "torch": "2.14.0"}}},
         "different version, torch: 2.13.0 and 2.14.0"),
        ({"recipe": {**RECIPE, "data": {"source": "movie", "text_column": "text"}}},
         "different data, data.source: trec and movie"),
        ({"recipe": {**RECIPE, "model": "mpnet"}}, "different setting, model: minilm and mpnet"),
        ({"recipe": {**RECIPE, "training": {**RECIPE["training"], "learning_rate": 1e-4}}},
         "different setting, training.learning_rate: 5e-05 and 0.0001"),
        ({"recipe": None}, "only one of the two has a recipe"),
        ({"recipe": None, "model": "GPT2"}, "different model: minilm · BertForSequenceClassification and GPT2"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(tmp_path: Path, other: dict[str, Any], warning: str) -> None:
    comparison = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b", **other))
    assert any(said.startswith(warning) for said in comparison.warnings), comparison.warnings
    assert f"not comparable: {warning}" in comparison.render()


def test_what_is_compared_is_no_difference(tmp_path: Path) -> None:
    changed = {**RECIPE, "freeze": {"policy": "static", "depth": 3}, "output_dir": "elsewhere"}
    second = write_run(tmp_path / "b", "static", options={"depth": 3}, recipe=changed)
    assert compare(write_run(tmp_path / "a"), second).warnings == ()


def test_an_unfinished_run_has_no_speed_up(tmp_path: Path) -> None:
    comparison = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b", killed_after=170))
    assert rows(comparison)["training speed-up over a"] == ("1.00x", "-")
    assert rows(comparison)["test accuracy"] == ("0.9400", "-")
    assert comparison.warnings == ("b has not finished (170 steps)",)


def test_runs_of_one_name_are_told_apart_by_path(tmp_path: Path) -> None:
    comparison = compare(write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"))
    assert comparison.names == (str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"))


def test_the_table_prints_markup_as_it_is(tmp_path: Path) -> None:
    first = write_run(tmp_path / "[red]a[/]", model="[bold]Model[/bold]")
    out = Console(file=io.StringIO(), width=200)
    out.print(compare(first, write_run(tmp_path / "b")).table())
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]Model[/bold]" in text
    assert load_run(first).name in text
