"""``frostline simulate``: from files and runs to tables, JSON and curves; one line for every error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from frostline.cli.simulate import parse_ranks
from frostline.errors import ConfigError
from frostline.simulator.published import check, setup
from tests.cli.test_cli import invoke
from tests.report.sample import BLOCKS, SAMPLES_PER_EPOCH, write_run

PART = {"forward_seconds": 0.001, "parameter_bytes": "4 MB", "activation_bytes": "10 MB"}
PROFILE = {"name": "toy", "stem": PART, "blocks": [{**PART, "count": BLOCKS}], "head": PART}
CLUSTER = {
    "name": "shed",
    "device_memory": "2 GB",
    "between": {"bytes_per_second": 1e8, "latency_seconds": 1e-4},
    "restart_seconds": 0,
}
POINTS = [{"samples": 1000, "depth": 3}, {"samples": 2000, "depth": 5}]
MOVES = {"moves": POINTS, "samples_per_epoch": 2000, "epochs": 3}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, content in (("profile", PROFILE), ("trajectory", MOVES), ("cluster", CLUSTER)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {name: tmp_path / f"{name}.yaml" for name in ("profile", "trajectory", "cluster")}


def numbers(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def test_curves_from_1_to_1024_ranks(files: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = invoke("simulate", *files.values(), "--batch", "16", "--json", tmp_path / "all.json",
                            "--plot", tmp_path / "curves.html")  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith("toy on shed: 6 blocks, 3 epochs of 2,000 samples, 16 a rank\n")
    for expected in ("nothing frozen", "performance", "efficiency", "1,024", "Cost of the run", "last epoch"):
        assert expected in out
    assert "note: with nothing frozen 23 samples a rank would fit already, not 16" in out
    found = numbers(tmp_path / "all.json")
    assert list(found["ranks"]) == [str(2**i) for i in range(11)]
    sides = found["ranks"]["64"]
    assert list(sides) == ["full", "none", "performance", "efficiency"]
    for side in sides.values():
        assert sum(stage["samples"] for stage in side["stages"]) == 6000
        assert sum(side["epoch_seconds"]) == pytest.approx(side["seconds"])
    assert f"{sides['full']['seconds'] / sides['performance']['seconds']:.2f}x" in out

    page = (tmp_path / "curves.html").read_text()
    assert page.count("<svg") == 6  # three plots, for a desktop and for a phone
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="https?:', page)
    assert "#0a01" not in page, "a reserved colour was left"
    assert "ranks at the start" in page
    assert "toy on shed" in page
    assert "Cost of the run, and how many times cheaper" in page


def test_one_number_of_ranks_shows_its_stages(files: dict[str, Path]) -> None:
    code, out, _ = invoke("simulate", *files.values(), "--batch", "16", "--ranks", "8")
    assert code == 0
    assert "Stages" in out
    found = [line.split()[1:5] for line in out.splitlines() if line.strip().startswith("efficiency")]
    assert found == [["0", "0", "16", "8"], ["1,000", "3", "32", "4"], ["2,000", "5", "64", "2"]]
    assert "Stages" not in invoke("simulate", *files.values(), "--batch", "16", "--ranks", "8,16")[1]


def test_the_options_reach_the_model(files: dict[str, Path], tmp_path: Path) -> None:
    def seconds(side: str, *options: str) -> float:
        target = tmp_path / "out.json"
        arguments = ("--batch", "16", "--ranks", "4", "--json", target, *options)
        code, _, err = invoke("simulate", *files.values(), *arguments)
        assert code == 0, err
        return float(numbers(target)["ranks"]["4"][side]["seconds"])

    full, frozen = seconds("full"), seconds("none")
    assert frozen < full
    assert seconds("none", "--cache") < frozen
    assert seconds("full", "--cache") == full
    assert seconds("full", "--epochs", "6") == pytest.approx(2 * full)
    assert seconds("full", "--samples", "4000") == pytest.approx(2 * full, rel=0.02)  # 32 steps to 2,000 samples
    assert seconds("full", "--batch", "4") > full


@pytest.mark.parametrize("what", ["", "summary.json", "events.jsonl"])
def test_a_run_is_a_trajectory(files: dict[str, Path], tmp_path: Path, what: str) -> None:
    run = write_run(tmp_path / "mine")
    target = tmp_path / "out.json"
    code, out, err = invoke("simulate", files["profile"], run / what, files["cluster"], "--batch", "16", "--ranks", "4",
                            "--json", target)  # fmt: skip
    assert (code, err) == (0, "")
    assert f"4 epochs of {SAMPLES_PER_EPOCH:,} samples" in out
    stages = numbers(target)["ranks"]["4"]["none"]["stages"]
    moved = json.loads((run / "summary.json").read_text())["trajectory"]
    assert [(s["start"], s["depth"]) for s in stages] == [(0, 0), *((p["samples"], p["depth"]) for p in moved)]
    # A summary that was carried away has the moves alone.
    (tmp_path / "alone.json").write_text((run / "summary.json").read_text())
    arguments = ["simulate", files["profile"], tmp_path / "alone.json", files["cluster"], "--batch", "16"]
    assert "give --samples" in invoke(*arguments)[2]
    assert invoke(*arguments, "--samples", SAMPLES_PER_EPOCH, "--epochs", "4", "--ranks", "4")[0] == 0


def test_an_inspected_model_is_a_profile(files: dict[str, Path], workbench: Path, tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", workbench / "model", "--batch", "4", "--length", "16", "--json")
    assert code == 0
    (tmp_path / "model.json").write_text(out)
    (tmp_path / "moves.yaml").write_text("[{samples: 100, depth: 3}]")
    code, out, err = invoke("simulate", tmp_path / "model.json", tmp_path / "moves.yaml", files["cluster"],
                            "--batch", "16", "--samples", "500", "--epochs", "2", "--ranks", "1,2")  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith("BertForSequenceClassification on shed: 4 blocks, 2 epochs of 500 samples")


def test_the_published_check_prints_its_fit_and_its_errors(tmp_path: Path) -> None:
    code, out, err = invoke("simulate", "--published", "--ranks", "64", "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for claim in check(setup()).claims:
        assert f"{claim.predicted:.2f}x {claim.published:.2f}x {claim.error:+.0%}" in flat
    assert "effective bandwidth of the ring" in out
    assert "2 evaluations an epoch, not 5" in out
    found = numbers(tmp_path / "out.json")
    assert found["published"]["iteration_seconds"] == {"one": 0.29, "all": 8.9}
    sides = found["ranks"]["64"]
    ratio = sides["full"]["seconds"] / sides["performance"]["seconds"]
    assert ratio == pytest.approx(found["published"]["claims"][0]["predicted"])
    assert sides["full"]["stages"][0]["step_seconds"] == pytest.approx(8.9, rel=1e-3)


def test_help_teaches() -> None:
    code, out, _ = invoke("simulate", "--help")
    assert code == 0
    for expected in ("inspect minilm --json", "--published", "bytes_per_second", "docs/simulator.md"):
        assert expected in " ".join(out.split())


def test_ranks_are_written_as_people_write_them() -> None:
    assert parse_ranks("1,2,4,...,1024") == [2**i for i in range(11)]
    assert parse_ranks("8") == [8]
    assert parse_ranks("3, ..., 20") == [3, 6, 12, 20]
    assert parse_ranks("4,2,2") == [2, 4]
    for wrong in ("", "0", "-1,...,8", "0,...,8", "...,8", "1,...", "1,x", "1.5"):
        with pytest.raises(ConfigError, match="--ranks"):
            parse_ranks(wrong)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["PROFILE"], "give the files PROFILE TRAJECTORY CLUSTER, or --published"),
        (["PROFILE", "TRAJECTORY", "CLUSTER"], "give --batch"),
        (["PROFILE", "TRAJECTORY", "CLUSTER", "--batch", "99"], "at most 23 fit"),
        (["PROFILE", "TRAJECTORY", "CLUSTER", "--batch", "8", "--ranks", "1;2"], "--ranks '1;2'"),
        (["PROFILE", "TRAJECTORY", "CLUSTER", "--batch", "8", "--plot", "x.png"], "must end with .html"),
        (["PROFILE", "TRAJECTORY", "NONE", "--batch", "8"], "cannot read the cluster"),
        (["CLUSTER", "TRAJECTORY", "CLUSTER", "--batch", "8"], "unknown key 'between'"),
        (["PROFILE", "FOLDER", "CLUSTER", "--batch", "8"], "is not a run"),
        (["PROFILE", "TRAJECTORY", "CLUSTER", "--batch", "8", "--json", "FOLDER"], "cannot write"),
        (["PROFILE", "TRAJECTORY", "CLUSTER", "--batch", "8", "--plot", "NOWHERE"], "cannot write"),
        (["PROFILE", "--published"], "brings its own"),
        (["--published", "--cache"], "brings its own"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    files: dict[str, Path], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "folder").mkdir()
    places = {name.upper(): path for name, path in files.items()}
    places |= {"FOLDER": tmp_path / "folder", "NONE": tmp_path / "none", "NOWHERE": tmp_path / "no" / "x.html"}
    code, _, err = invoke("simulate", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert expected in err


def test_moves_after_the_end_are_left_out_and_said(files: dict[str, Path]) -> None:
    code, out, _ = invoke("simulate", *files.values(), "--batch", "23", "--ranks", "2", "--epochs", "0.75")
    assert code == 0
    assert "note: the run ends at sample 1,500: later moves are left out (1)" in out
