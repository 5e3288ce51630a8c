"""Whole runs of a tiny real model: what they leave, that they repeat, resume, and fail cleanly."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from frostline.adapters.recorder import Recorder
from frostline.errors import ConfigError, FrostlineError, ResumeError
from frostline.events import PHASES, read_events
from frostline.recipes.runner import RunInterrupted, RunResult, run
from frostline.recipes.schema import Recipe
from tests.recipes.workbench import BLOCKS, recipe_content

STEPS = 24


def start(root: Path, **changes: Any) -> RunResult:
    return run(Recipe.model_validate(recipe_content(root, **changes)))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind without what a clock wrote."""
    clock = ("time", "seconds", "step_seconds", "bound_seconds")
    return [
        {key: value for key, value in event.items() if key not in clock}
        for event in read_events(folder / "events.jsonl")
        if event["event"] == kind
    ]


@contextmanager
def interrupted_at(step: int, *, title: str = "recipe") -> Iterator[None]:
    """Ctrl-C in the middle of a run, after ``step`` of the side that ``title`` names."""
    original = Recorder.on_step_end

    def press(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if self.title == title and state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", press)
        yield


def test_a_run_leaves_what_the_architecture_page_says(workbench: Path) -> None:
    result = start(workbench, baseline="full")
    folder, baseline = result.directory, result.directory / "baseline"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "model", "events.jsonl", "summary.json", "checkpoints", "baseline",
    }  # fmt: skip
    for side, summary in ((folder, result.summary), (baseline, result.baseline)):
        assert summary is not None
        assert json.loads((side / "summary.json").read_text()) == summary
        seconds = summary["seconds"]
        assert set(seconds) == {*PHASES, "total"}
        assert sum(seconds[phase] for phase in PHASES) == pytest.approx(seconds["total"], rel=1e-6)
        assert all(value >= 0 for value in seconds.values())
        assert (summary["steps"], summary["samples"], summary["seed"]) == (STEPS, 192, 0)
        assert {"accuracy", "macro_f1", "loss"} == set(summary["metrics"]) == set(summary["test"])
        intervals = events(side, "interval")
        assert sum(interval["steps"] for interval in intervals) == STEPS
        spent = [e["seconds"] for e in read_events(side / "events.jsonl") if e["event"] == "interval"]
        for phase in ("train", "evaluate", "save"):
            assert sum(interval[phase] for interval in spent) <= seconds[phase] + 1e-6
            assert sum(interval[phase] for interval in spent) > 0
        assert [e["step"] for e in events(side, "loss")] == [4, 8, 12, 16, 20, 24]
        assert [e["step"] for e in events(side, "evaluation")] == [12, 24]
        assert [e["step"] for e in events(side, "checkpoint")] == [5, 10, 15, 20, 24]
        assert len(events(side, "end")) == len(events(side, "run")) == 1
    assert result.summary["blocks"] == BLOCKS
    assert result.summary["decisions"] == 8
    assert result.summary["trajectory"][0] == {"step": 0, "samples": 0, "depth": 0}
    assert result.summary["final_depth"] > 0
    assert result.baseline is not None
    assert result.baseline["policy"]["name"] == "none"
    assert result.baseline["trajectory"] == [{"step": 0, "samples": 0, "depth": 0}]


def test_the_model_opens_as_any_other(workbench: Path) -> None:
    folder = start(workbench, freeze={"policy": "static", "depth": 1}).directory / "model"
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt")]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert set(model.config.label2id) == {"sea", "sky", "soil"}
    assert pipeline("text-classification", model=str(folder))("a wave in the tide")[0]["label"] in model.config.label2id


def test_a_run_repeats_bit_for_bit_and_the_baseline_is_the_plain_run(workbench: Path) -> None:
    first = start(workbench, output_dir=str(workbench / "first"), baseline="full")
    again = start(workbench, output_dir=str(workbench / "again"))
    plain = start(workbench, output_dir=str(workbench / "plain"), freeze={"policy": "none"})
    assert weights(first.directory) == weights(again.directory)
    assert first.summary["trajectory"] == again.summary["trajectory"]
    assert weights(first.directory / "baseline") == weights(plain.directory)
    assert weights(first.directory) != weights(plain.directory)


def test_the_schedule_sets_the_learning_rate(workbench: Path) -> None:
    folder = start(workbench, schedule={"at": [0.3, 0.6], "factor": [0.7, 0.4]}).directory
    # The rate that a step was taken with: those after step 8 = ceil(0.3 x 24) and 15 = ceil(0.6 x 24) have a new one.
    rates = [event["learning_rate"] for event in events(folder, "loss")]
    assert rates == pytest.approx([1e-3, 1e-3, 7e-4, 4e-4, 4e-4, 4e-4])


@pytest.mark.parametrize("policy", ["gradient-norm", "none"])
def test_a_resumed_run_is_the_uninterrupted_one(workbench: Path, policy: str) -> None:
    freeze = recipe_content(workbench)["freeze"] if policy == "gradient-norm" else {"policy": "none"}
    whole = start(workbench, freeze=freeze, output_dir=str(workbench / "whole"))
    with interrupted_at(18), pytest.raises(RunInterrupted, match="resume=true"):
        start(workbench, freeze=freeze)
    resumed = start(workbench, freeze=freeze, resume=True)
    assert weights(resumed.directory) == weights(whole.directory)
    for part in ("policy", "trajectory", "decisions", "steps", "samples", "metrics", "test", "final_depth", "limits"):
        assert resumed.summary[part] == whole.summary[part], part
    for kind in ("run", "decision", "evaluation", "interval"):
        assert events(resumed.directory, kind) == events(whole.directory, kind), kind
    losses, expected = events(resumed.directory, "loss"), events(whole.directory, "loss")
    # The Trainer logs a mean since the last log and starts it anew at a checkpoint: step 16 averages one step, not 4.
    assert [loss for loss in losses if loss["step"] != 16] == [loss for loss in expected if loss["step"] != 16]
    assert len(losses) == len(expected)
    assert [Path(event["path"]).name for event in events(resumed.directory, "resume")] == ["checkpoint-15"]
    seconds = resumed.summary["seconds"]
    assert sum(seconds[phase] for phase in PHASES) == pytest.approx(seconds["total"], rel=1e-6)


def test_each_side_resumes_where_it_was(workbench: Path) -> None:
    whole = start(workbench, baseline="full", output_dir=str(workbench / "whole"))
    for step in (3, 18):  # before and after the baseline's first checkpoint
        with interrupted_at(step, title="baseline"), pytest.raises(RunInterrupted):
            start(workbench, baseline="full", resume=step != 3)
    finished = tree(workbench / "run" / "model")
    resumed = start(workbench, baseline="full", resume=True)
    assert tree(workbench / "run" / "model") == finished
    assert weights(resumed.directory / "baseline") == weights(whole.directory / "baseline")
    assert [Path(event["path"]).name for event in events(resumed.directory / "baseline", "resume")] == ["checkpoint-15"]
    assert events(resumed.directory, "resume") == []
    # A baseline can be added to a finished run, and a finished run "resumes" to its result.
    shutil.rmtree(resumed.directory / "baseline")
    added = start(workbench, baseline="full", resume=True)
    assert added.summary == resumed.summary
    assert weights(added.directory / "baseline") == weights(whole.directory / "baseline")


def test_resume_refuses_what_it_cannot_continue(workbench: Path) -> None:
    with pytest.raises(ResumeError, match=r"nothing to resume: .* holds no run"):
        start(workbench, resume=True)
    assert not (workbench / "run").exists()
    with interrupted_at(2), pytest.raises(RunInterrupted, match="no checkpoint yet: start again with overwrite=true"):
        start(workbench)
    with pytest.raises(ResumeError, match="no complete checkpoint in"):
        start(workbench, resume=True)
    with interrupted_at(7), pytest.raises(RunInterrupted):
        start(workbench, overwrite=True)
    training = recipe_content(workbench)["training"] | {"learning_rate": 2e-3}
    with pytest.raises(ResumeError, match=r"training.learning_rate is 0.002, there 0.001\. .*overwrite=true") as caught:
        start(workbench, resume=True, training=training, seed=1)
    assert "seed is 1, there 0" in str(caught.value)


def test_a_used_directory_is_an_error_that_names_the_ways_out(workbench: Path) -> None:
    start(workbench)
    before = tree(workbench / "run")
    with pytest.raises(ConfigError, match=r"is not empty: overwrite=true replaces .* resume=true continues"):
        start(workbench)
    assert tree(workbench / "run") == before
    (workbench / "papers").mkdir()
    (workbench / "papers" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds something else than a run"):
        start(workbench, output_dir=str(workbench / "papers"), overwrite=True)
    assert (workbench / "papers" / "thesis.txt").read_text() == "dear"


def test_overwrite_replaces_the_run_once_the_new_one_has_begun(workbench: Path) -> None:
    start(workbench, baseline="full")
    before = tree(workbench / "run")
    with pytest.raises(FrostlineError):  # nothing trains: found when training begins
        start(workbench, overwrite=True, freeze={"policy": "static", "depth": BLOCKS})
    assert tree(workbench / "run") == before
    with interrupted_at(7), pytest.raises(RunInterrupted):
        start(workbench, overwrite=True, seed=1)
    after = {path.name for path in (workbench / "run").iterdir()}
    assert after == {"recipe.yaml", "events.jsonl", "checkpoints"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": {"policy": "static", "depth": BLOCKS}}, str(BLOCKS)),
        ({"freeze": {"policy": "static", "depth": 1, "blocks": "bert.encoder.layers"}}, "bert.encoder.layer"),
        ({"data": {"source": "DATA", "text_column": "txt"}}, "unknown column 'txt'.*label, text"),
        ({"data": {"source": "nowhere.csv"}}, "nowhere.csv"),
        ({"model": "minillm"}, "minilm"),
        ({"max_length": 500}, "max_length=500"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workbench: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("data", {}).get("source") == "DATA":
        changes = {"data": changes["data"] | {"source": str(workbench / "data")}}
    deep = workbench / "some" / "where" / "run"
    with pytest.raises(FrostlineError, match=message) as caught:
        start(workbench, output_dir=str(deep), **changes)
    assert "\n" not in str(caught.value)
    assert not (workbench / "some").exists()


@pytest.mark.parametrize("place", ["model/config.json/run", "/proc/run"])
def test_an_unwritable_output_directory(workbench: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written: |is a file"):
        start(workbench, output_dir=str(workbench / place))
    assert (workbench / "model" / "config.json").is_file()


def test_a_full_disk_keeps_the_whole_checkpoints_only(workbench: Path) -> None:
    with interrupted_at(7), pytest.raises(RunInterrupted):
        start(workbench)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # smaller than the weights, larger than the log
    try:
        with pytest.raises(FrostlineError, match=r"cannot write the run in .*; checkpoint-5 is kept") as caught:
            start(workbench, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (workbench / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]
    assert start(workbench, resume=True).summary["steps"] == STEPS
