"""``benchmarks/distributed.py`` on a tiny model: 1 and 2 ranks are compared, bytes counted and steps timed.

What takes ranks is among the slow tests: ``tests/distributed`` has the same claims of smaller runs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.distributed import (
    _TIMED_STEPS,
    PARTS,
    SIDES,
    add_medians,
    agreement_cases,
    by_depth,
    compare,
    main,
    ratios,
    run,
    timed_cases,
)
from benchmarks.table import distributed

from frostline.recipes.schema import Recipe
from tests.recipes.workbench import BLOCKS, make_data, make_model, recipe_content

STEPS = 24


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the ranks saw, by how many there were."""
    root = tmp_path_factory.mktemp("workbench")
    make_model(root / "model")
    make_data(root / "data")
    recipe = Recipe.model_validate(recipe_content(root))
    cases = {**agreement_cases(STEPS), **timed_cases()}
    return {ranks: run(recipe, cases, ranks) for ranks in (1, 2)}


def policies(found: dict[int, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """The runs of part agreement, to be changed at will."""
    chosen = agreement_cases(STEPS)
    return {
        ranks: [{name: copy.deepcopy(rank[name]) for name in chosen} for rank in seen] for ranks, seen in found.items()
    }


@pytest.mark.slow
def test_two_ranks_train_as_one(found: dict[int, list[dict[str, Any]]]) -> None:
    rows = compare(policies(found))
    assert [(row["policy"], row["ranks"]) for row in rows] == [
        ("gradient-norm", 1), ("gradient-norm", 2), ("ramp", 1), ("ramp", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["same_decisions"]
        assert row["same_weights"]
        assert row["moves_of_one_rank"]
        assert row["moves"], "nothing froze: the test shows nothing"
        assert row["free_running"] <= 1e-3
        assert row["met"]
        assert len(row["losses"]) == STEPS
        assert len(row["cpu_seconds"]) == len(row["weights"]) == row["ranks"]
        assert min(row["cpu_seconds"]) > 0
        assert not row["limits"]


@pytest.mark.slow
def test_ranks_that_do_not_agree_are_found(found: dict[int, list[dict[str, Any]]]) -> None:
    wrong = policies(found)
    one, other = wrong[2]
    other["ramp"]["weights"] = "others"
    one["gradient-norm"]["decisions"][-1]["depth"] += 1
    one["gradient-norm"]["moves"][-1] = (1, 1)
    one["ramp"]["whole"]["10"] *= 1.001
    (_, first, _, second) = compare(wrong)
    assert (first["same_decisions"], first["same_weights"], first["moves_of_one_rank"]) == (False, True, False)
    assert (second["same_decisions"], second["same_weights"], second["moves_of_one_rank"]) == (True, False, True)
    assert first["met"]
    assert second["teacher_forced"] == pytest.approx(1e-3, rel=0.1)
    assert not second["met"]


@pytest.mark.slow
def test_bytes_follow_what_trains(found: dict[int, list[dict[str, Any]]]) -> None:
    steps = [step for rank in found[2] for step in rank["ramp"]["steps"]]
    rows = by_depth(steps)
    assert [row["depth"] for row in rows] == list(range(BLOCKS))
    assert all(row["met"] and row["sent"] == [row["active"]] * 2 for row in rows)
    assert rows[0]["active"] > rows[-1]["active"]
    (row, *_) = by_depth([{**step, "sent": int(1.03 * step["active"])} for step in steps])
    assert not row["met"]
    assert {step["sent"] for rank in found[1] for step in rank["ramp"]["steps"]} == {0}, "one rank sends nothing"


@pytest.mark.slow
def test_what_was_found_is_shown(found: dict[int, list[dict[str, Any]]]) -> None:
    samples: dict[int, dict[str, list[float]]] = {ranks: {side: [] for side in SIDES} for ranks in found}
    for ranks, seen in found.items():
        timed = {side: seen[0][side] for side in SIDES}
        assert all(len(one["steps"]) == _TIMED_STEPS for one in timed.values())
        assert {step["depth"] for step in timed["half frozen"]["steps"]} == {BLOCKS // 2}
        assert {step["depth"] for step in timed["full"]["steps"]} == {0}
        add_medians(samples[ranks], timed)
        add_medians(samples[ranks], timed)
    made = {
        "device": "cpu",
        "date": "today",
        "command": "make",
        "environment": {"processor": "a processor", "threads": 1, "packages": {"torch": "1"}},
    }
    steps = found[2][0]["ramp"]["steps"]
    report = {
        "settings": {"recipe": "tiny"},
        "batch": 16,
        "parts": {
            "agreement": {**made, "steps": STEPS, "runs": compare(policies(found))},
            "bytes": {**made, "runs": [{"arguments": "none", "ranks": 2, "depths": by_depth(steps)}]},
            "time": {**made, "rounds": 2, **ratios(samples, 0)},
        },
    }
    table = "\n".join(distributed(json.loads(json.dumps(report))))
    for expected in ("| ramp | 2 | yes | yes | yes |", "| none | 2 | 3 |", "| half frozen | ", "2 rounds"):
        assert expected in table


def test_parts_are_added_to_a_results_file_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str) -> Any:
        return lambda recipe, options: {"measured": name, "rounds": options.rounds}

    for name in ("agreement", "time"):
        monkeypatch.setitem(PARTS, name, part(name))
    out = tmp_path / "distributed.json"
    for arguments in (["--part", "agreement"], ["--part", "time", "--rounds", "3"]):
        assert main(["trec", *arguments, "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert [found["measured"] for found in parts.values()] == ["agreement", "time"]
    assert parts["time"]["rounds"] == 3
    assert main(["trec", "--seed", "1", "--part", "time", "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())["parts"]) == ["time"], "figures of another seed are no company"
    assert main(["nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err
