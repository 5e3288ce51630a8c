"""Reading runs: finished, killed, resumed, trained twice, broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frostline.errors import FrostlineError
from frostline.events import EventLog
from frostline.report import load_run
from frostline.report.run import Point, results
from tests.report.sample import LIMIT, PLAN, write_run

MOVES = [Point(0, 0, 0), Point(60, 960, 1), Point(80, 1280, 2), Point(100, 1600, 3), Point(120, 1920, 4)]
MOVES.append(Point(140, 2240, 5))


def test_a_finished_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "mine", baseline=True))
    assert run.finished
    assert (run.name, run.policy, run.seed, run.blocks) == ("mine", "gradient-norm", 3, 6)
    assert run.options == {"percentile": 50.0, "evaluations_per_epoch": 5}
    assert run.model == "minilm · BertForSequenceClassification"
    assert (run.steps, run.samples, len(run.decisions), run.final_depth) == (400, 6400, 20, 5)
    assert run.trajectory == MOVES
    assert run.validation == {"accuracy": pytest.approx(0.94), "loss": pytest.approx(0.225)}
    assert run.test == {"accuracy": 0.94, "f1": pytest.approx(0.93), "loss": 0.21}
    assert run.limits == [LIMIT]
    assert run.training_seconds == pytest.approx(
        run.seconds["train"] + run.seconds["statistics"] + run.seconds["decide"]
    )
    assert run.seconds["total"] == pytest.approx(sum(v for k, v in run.seconds.items() if k != "total"))
    assert run.baseline is not None
    assert (run.baseline.name, run.baseline.policy, run.baseline.trajectory) == (
        "mine/baseline", "none", [Point(0, 0, 0)],
    )  # fmt: skip


def test_a_killed_run_is_read_from_its_events(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "killed", killed_after=170))
    assert not run.finished
    assert run.summary is None
    assert run.trajectory == MOVES
    assert (run.steps, run.samples, run.seed) == (170, 2720, 3)
    assert run.validation["accuracy"] == pytest.approx(0.79)
    assert run.test == {}
    assert run.seconds["total"] == pytest.approx(sum(v for k, v in run.seconds.items() if k != "total"))
    intervals = [event for event in run.events if event["event"] == "interval"]
    assert run.seconds["train"] == pytest.approx(sum(event["seconds"]["train"] for event in intervals))


def test_events_and_summary_tell_the_same_trajectory(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    told = load_run(path)
    (path / "summary.json").unlink()
    pieced = load_run(path)
    assert pieced.trajectory == told.trajectory
    assert pieced.seconds == told.seconds, "the end event has the split of a run killed just before its summary"
    assert pieced.final_depth == told.final_depth


def test_a_depth_held_from_the_start_is_in_the_trajectory(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "static", options={"depth": 3})
    assert load_run(path).trajectory == [Point(0, 0, 3)]
    (path / "summary.json").unlink()
    assert load_run(path).trajectory == [Point(0, 0, 3)]


def test_a_second_training_in_one_log_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(path, killed_after=170)
    log = path / "events.jsonl"
    log.write_text(log.read_text().rpartition("\n")[0] + "\n")  # the torn line goes
    write_run(path, "static", options={"depth": 2})
    run = load_run(path)
    assert (run.policy, run.decisions, run.trajectory) == ("static", [], [Point(0, 0, 2)])


def test_a_resumed_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(path, killed_after=160, recipe=None)
    file = path / "events.jsonl"
    file.write_text(file.read_text().rpartition("\n")[0] + "\n")
    log = EventLog(file)
    header = {"policy": {"name": "gradient-norm", "options": {}}, "plan": PLAN.numbers(), "blocks": 6, "model": "M"}
    log.append("run", step=0, samples=0, **header)
    log.append("resume", step=160, samples=2560, path="checkpoint-160")
    run = load_run(path)
    assert len(run.decisions) == 8
    assert run.trajectory == MOVES


def test_results_leave_out_timings_and_prefixes() -> None:
    given = {"eval_loss": 0.5, "eval_f1": 0.7, "eval_accuracy": 0.8, "eval_runtime": 3.0, "epoch": 2.0, "eval_x": "nan"}
    found = results(given)
    assert list(found) == ["accuracy", "f1", "x", "loss"]
    assert found["accuracy"] == 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no run at .*no such folder"),
        (lambda path: path.write_text("x"), "no run at .*it is a file"),
        (lambda path: path.mkdir(), "is not a run: it has no events.jsonl"),
        (lambda path: write_run(path / "seed0"), "not a run.*runs inside it: seed0"),
        (lambda path: _log(path, "{oops\n"), "cannot read"),
        (lambda path: _log(path, "[1]\n"), "not an event log"),
        (lambda path: _log(path, ""), "no `run` event"),
        (lambda path: _log(path, json.dumps({"event": "loss", "step": 1, "samples": 1}) + "\n"), "no `run` event"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "run")  # type: ignore[operator]
    with pytest.raises(FrostlineError, match=message) as caught:
        load_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot read"), ('{"policy": 1}', "lacks model, samples")])
def test_a_broken_summary_is_said(tmp_path: Path, content: str, message: str) -> None:
    (write_run(tmp_path / "run") / "summary.json").write_text(content)
    with pytest.raises(FrostlineError, match=message):
        load_run(tmp_path / "run")


def test_a_broken_baseline_does_not_hide_the_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", baseline=True)
    (path / "baseline" / "events.jsonl").write_text("")
    run = load_run(path)
    assert run.baseline is None
    assert "the baseline is left out" in run.notes[0]


def test_a_broken_recipe_is_a_note(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "recipe.yaml").write_text("a: [")
    run = load_run(path)
    assert run.recipe == {}
    assert "recipe.yaml cannot be read" in run.notes[0]


def _log(path: Path, content: str) -> None:
    path.mkdir()
    (path / "events.jsonl").write_text(content)
