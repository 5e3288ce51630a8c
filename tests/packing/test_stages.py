"""The file that lists a run's stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from frostline.errors import ResumeError
from frostline.packing import Job, Look, Stage, Stages


def test_what_is_written_is_read(tmp_path: Path) -> None:
    job = Job(rows=2, peaks=[[3, 4], [1, 2]], row_seconds=0.5, cap=3, adaptive=False)
    second = Stage(1, 1, 8, samples=64, depth=1)
    looks = [Look(32, 1, None, {"left": 9}), Look(64, 2, second, {"left": 1.5})]
    stages = Stages("name", 4, [Stage(0, 4, 2), second], looks, job)
    stages.write(tmp_path)
    assert Stages.read(tmp_path) == stages
    assert stages.look_at(64) is looks[1]
    assert stages.look_at(63) is None


def test_nothing_and_something_else(tmp_path: Path) -> None:
    assert Stages.read(tmp_path) is None
    (tmp_path / "stages.json").write_text('{"stages": [')
    with pytest.raises(ResumeError, match=r"stages\.json"):
        Stages.read(tmp_path)
