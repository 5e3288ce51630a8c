"""Replaying recorded runs through policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frostline.errors import ConfigError, FrostlineError
from frostline.policies.gradient_norm import GradientNorm
from frostline.report import load_run, replay
from tests.report.sample import write_run


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_the_same_options_give_the_recorded_trajectory(recorded: Path) -> None:
    outcome = replay(recorded, "gradient-norm", {"percentile": 50})
    assert outcome.divergence is None
    assert outcome.trajectory == load_run(recorded).trajectory
    assert len(outcome.steps) == 1 + 20
    assert outcome.render().splitlines()[-1] == "no divergence: all 20 recorded evaluations were decided alike"


def test_percentile_75_diverges_and_says_where(recorded: Path) -> None:
    outcome = replay(recorded, "gradient-norm", {"percentile": 75})
    split = outcome.divergence
    assert split is not None
    assert (split.evaluation, split.step, split.samples) == (3, 60, 960)
    assert (split.decision.depth, split.recorded.depth) == (2, 1)
    assert outcome.steps[-1] is split, "nothing is said beyond the divergence"
    assert [(point.samples, point.depth) for point in outcome.trajectory] == [(0, 0), (960, 2)]
    verdict = outcome.render().splitlines()[-1]
    assert verdict.startswith("first divergence at evaluation 3, step 60 (depth 2, recorded depth 1)")
    assert "not known" in verdict


def test_options_that_are_not_given_are_the_runs_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", options={"percentile": 75.0, "evaluations_per_epoch": 4})
    outcome = replay(run, "gradient-norm", {})
    assert outcome.divergence is None
    assert outcome.options == {"percentile": 75.0, "evaluations_per_epoch": 4}


def test_other_intervals_cannot_be_replayed(recorded: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks every 160 samples, the run was asked every 320 samples"):
        replay(recorded, "gradient-norm", {"evaluations_per_epoch": 10})


def test_a_statistic_that_was_not_recorded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "ramp", options={"evaluations_per_epoch": 5})
    with pytest.raises(ConfigError, match=r"needs the statistic gradient_sum, which run .* \(policy 'ramp'\) did not"):
        replay(run, "gradient-norm", {})


def test_scores_that_are_null_in_the_log(recorded: Path) -> None:
    log = recorded / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        if event["event"] == "decision":
            event["observation"]["scores"] = None
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(ConfigError, match="gradient_sum"):
        replay(recorded, "gradient-norm", {})


def test_a_run_of_which_not_every_decision_was_recorded(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientNorm, "log_every", 100)
    with pytest.raises(ConfigError, match="each 100th was recorded: it cannot be replayed"):
        replay(recorded, "gradient-norm", {})


def test_a_policy_that_decides_once_diverges_where_the_run_moved(recorded: Path) -> None:
    split = replay(recorded, "static", {"depth": 0}).divergence
    assert split is not None
    assert (split.samples, split.decision.depth, split.recorded.depth) == (960, 0, 1)


def test_a_different_start_ends_the_replay_at_once(recorded: Path) -> None:
    outcome = replay(recorded, "static", {"depth": 2})
    assert len(outcome.steps) == 1
    assert "first divergence at the start, step 0 (depth 2, recorded depth 0)" in outcome.render()


def test_resting_layers_are_part_of_a_decision(tmp_path: Path) -> None:
    options = {"active": 2, "every": 20}
    run = write_run(tmp_path / "run", "random-blocks", options=options)
    assert replay(run, "random-blocks", options).divergence is None
    split = replay(run, "random-blocks", {"seed": 1}).divergence
    assert split is not None
    assert split.decision.depth == split.recorded.depth == 0
    assert split.decision.resting != split.recorded.resting


def test_points_that_the_policy_would_not_have_asked_for_are_noted(recorded: Path) -> None:
    outcome = replay(recorded, "ramp", {"start": 0.9})
    assert "inexact: policy 'ramp' asks every 1,600 samples, the run was asked every 320 samples" in outcome.notes[0]
    assert outcome.notes[0] in outcome.render()


def test_a_move_that_the_engine_held_back_is_no_divergence(recorded: Path) -> None:
    log = recorded / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    held = [event for event in events if event["event"] == "decision" and event["evaluation"] == 7]
    held[0].update(depth=held[0]["depth_before"], applied=False)
    kept = [event for event in events if event["event"] != "decision" or event["evaluation"] <= 7]
    log.write_text("".join(json.dumps(event) + "\n" for event in kept))
    outcome = replay(recorded, "gradient-norm", {})
    assert outcome.divergence is None
    assert "held: no moves left" in outcome.render()


def test_a_killed_run_replays(tmp_path: Path) -> None:
    outcome = replay(write_run(tmp_path / "run", killed_after=170), "gradient-norm", {})
    assert outcome.divergence is None
    assert outcome.recorded_evaluations == 8


def test_a_run_without_decisions_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FrostlineError, match=r"policy 'none'\) recorded no decisions.*for example gradient-norm"):
        replay(write_run(tmp_path / "run", "none"), "gradient-norm", {})


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("gradnorm", {}, "did you mean 'gradient-norm'"),
        ("gradient-norm", {"percentile": 101}, "percentile=101"),
        ("gradient-norm", {"percentil": 50}, "did you mean 'percentile'"),
    ],
)
def test_bad_policies_and_options(recorded: Path, policy: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay(recorded, policy, options)
