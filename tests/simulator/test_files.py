"""Reading profiles, trajectories and clusters: what is understood, and one clear line for what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from frostline.errors import ConfigError
from frostline.simulator import read_cluster, read_profile, read_trajectory

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"
PART = {"forward_seconds": 0.1, "parameter_bytes": 10, "activation_bytes": "1 kB"}
PROFILE: dict[str, Any] = {"stem": PART, "blocks": [{**PART, "count": 3}], "head": PART}
CLUSTER: dict[str, Any] = {"device_memory": "16 GiB", "between": {"bytes_per_second": 1e9}}
READ = {"profile": read_profile, "cluster": read_cluster, "trajectory": read_trajectory}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_sizes_counts_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path / "p.yaml", PROFILE))
    assert profile.size == 3
    assert [part.activation_bytes for part in profile.parts] == [1000] * 5
    text = "{device_memory: 16 GiB, between: {bytes_per_second: 1.25e9, latency_seconds: 50e-6}}"
    cluster = read_cluster(write(tmp_path / "c.yaml", text))
    assert cluster.device_memory == 16 * 2**30
    assert (cluster.between.bytes_per_second, cluster.between.latency_seconds) == (1.25e9, 50e-6)
    assert (cluster.overlap, cluster.restart_seconds, cluster.price_per_rank_hour) == (0.5, 20.0, 1.0)


def test_an_inspection_is_a_profile(tmp_path: Path) -> None:
    part = {"bytes": 40, "saved_bytes": 80, "forward_seconds": 0.8, "backward_seconds": 1.2}
    parts = [{"name": name, **part} for name in ("stem", "block 0", "block 1", "head")]
    found = {"model": "Bert", "batch": 8, "parts": parts, "limits": [], "optimizer_state": 1.0}
    (tmp_path / "p.json").write_text(json.dumps(found))
    profile = read_profile(tmp_path / "p.json")
    assert (profile.name, profile.size, profile.optimizer_state) == ("Bert", 2, 1.0)
    for one in profile.parts:
        assert (one.forward_seconds, one.backward) == pytest.approx((0.1, 0.15))
        assert (one.parameter_bytes, one.activation_bytes) == (40, 10)


def test_a_plan_has_a_profile(tmp_path: Path) -> None:
    planned = write(tmp_path / "plan.json", json.dumps({"recipe": {}, "predictions": [], "profile": PROFILE}))
    assert read_profile(planned) == read_profile(write(tmp_path / "p.yaml", PROFILE))


@pytest.mark.parametrize(
    "content",
    [
        [{"samples": 50, "depth": 2}, {"samples": 80, "depth": 3, "step": 5}],
        {"moves": [{"samples": 50, "depth": 2}, {"samples": 80, "depth": 3}], "samples_per_epoch": 60, "epochs": 2},
        {"policy": {}, "trajectory": [{"step": 3, "samples": 50, "depth": 2}, {"step": 5, "samples": 80, "depth": 3}]},
    ],
)
def test_a_trajectory_is_a_list_a_mapping_or_a_summary(tmp_path: Path, content: Any) -> None:
    course = read_trajectory(write(tmp_path / "t.yaml", content)).course(100, 1.0)
    assert [(s.start, s.samples, s.depth) for s in course.stretches()] == [(0, 50, 0), (50, 30, 2), (80, 20, 3)]


def test_what_a_trajectory_says_of_the_run_is_taken_unless_something_else_is_given(tmp_path: Path) -> None:
    content = {"moves": [], "samples_per_epoch": 60, "epochs": 2.5}
    trajectory = read_trajectory(write(tmp_path / "t.yaml", content))
    assert trajectory.course().samples == 150
    assert trajectory.course(10).samples == 25
    assert [(s.samples, s.epoch) for s in trajectory.course(None, 1.5).stretches()] == [(60, 0), (30, 1)]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("profile", {**PROFILE, "blocks": []}, "blocks: List should have at least 1 item"),
        ("profile", {**PROFILE, "steam": PART}, "unknown key 'steam': did you mean 'stem'"),
        ("profile", {**PROFILE, "head": {**PART, "forward_second": 1}}, "did you mean 'forward_seconds'"),
        ("profile", {**PROFILE, "blocks": [{**PART, "cuont": 2}]}, "unknown key of blocks.0 'cuont': did you mean 'co"),
        ("profile", {**PROFILE, "stem": {**PART, "forward_seconds": -1}}, "stem.forward_seconds=-1: "),
        ("profile", {**PROFILE, "stem": {**PART, "parameter_bytes": ".inf"}}, "stem.parameter_bytes="),
        ("profile", {**PROFILE, "stem": {**PART, "activation_bytes": float("inf")}}, "must be bytes"),
        ("profile", {"stem": PART, "head": PART}, "blocks: missing; it is required"),
        ("profile", {**PROFILE, **dict.fromkeys(("stem", "head"), {**PART, "forward_seconds": 0}),
                     "blocks": [{**PART, "forward_seconds": 0}]}, "forward_seconds is 0 for every part"),
        ("profile", {"batch": 8, "parts": [{"bytes": 3, "saved_bytes": None}]}, "that it could measure"),
        ("profile", "[1, 2]", "must be a mapping of keys to values, not list"),
        ("profile", "{stem: ", "is no YAML or JSON"),
        ("cluster", {**CLUSTER, "overlap": 1.5}, "overlap=1.5: Input should be less than or equal to 1"),
        ("cluster", {**CLUSTER, "between": {"bytes_per_second": 0}}, "between.bytes_per_second=0: "),
        ("cluster", {**CLUSTER, "between": {"bytes_per_second": float("nan")}}, "between.bytes_per_second=nan: "),
        ("cluster", {**CLUSTER, "between": {"bandwidth": 3}}, "unknown key of between 'bandwidth'"),
        ("cluster", {**CLUSTER, "ranks_per_host": 8}, "ranks_per_host=8 needs inside"),
        ("cluster", {**CLUSTER, "device_memory": "much"}, "device_memory='much'"),
        ("cluster", {**CLUSTER, "price_per_rank_hour": 0}, "price_per_rank_hour=0: "),
        ("trajectory", [{"samples": 5, "depth": 1}, {"samples": 4, "depth": 2}], "samples=4 comes after 5"),
        ("trajectory", [{"samples": 5, "depth": -1}], "moves.0.depth=-1: "),
        ("trajectory", [{"sample": 5, "depth": 1}], "did you mean 'samples'"),
        ("trajectory", "3", "must be a mapping of keys to values, not int"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(tmp_path: Path, kind: str, content: Any, message: str) -> None:
    path = write(tmp_path / f"{kind}.yaml", content)
    with pytest.raises(ConfigError, match=message) as caught:
        READ[kind](path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{kind} '{path}'")


def test_a_file_that_is_not_there_and_many_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the profile .*No such file"):
        read_profile(tmp_path / "none.yaml")
    bad = {**PROFILE, "blocks": [{**PART, "forward_seconds": -1}] * 5}
    with pytest.raises(ConfigError, match="; and 2 more$"):
        read_profile(write(tmp_path / "p.yaml", bad))


@pytest.mark.parametrize(
    ("samples", "epochs", "message"),
    [(None, 1.0, "give --samples"), (10, None, "give --epochs"), (0, 1.0, "samples=0"), (10, 0.0, "epochs=0")],
)
def test_a_run_of_unknown_length(tmp_path: Path, samples: int | None, epochs: float | None, message: str) -> None:
    trajectory = read_trajectory(write(tmp_path / "t.yaml", "[]"))
    with pytest.raises(ConfigError, match=message):
        trajectory.course(samples, epochs)


def test_the_files_in_the_documentation_are_read(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n# (\w+)\.yaml.*?\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert [kind for kind, _ in examples] == ["profile", "trajectory", "cluster"]
    for kind, text in examples:
        READ[kind](write(tmp_path / f"{kind}.yaml", text))
