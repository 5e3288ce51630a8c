"""The state's two files: torn, mixed, of another format, or killed while they are written."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from frostline.errors import ResumeError
from frostline.state import has_state, is_complete, load_state, save_state

JSON, TENSORS = "frostline_state.json", "frostline_state.safetensors"


def write(folder: Path, number: int, size: int = 64) -> None:
    save_state(folder, {"number": number}, {"sum": torch.full((size,), float(number))})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    values, tensors = load_state(tmp_path)
    assert values == {"number": 2}
    assert torch.equal(tensors["sum"], torch.full((64,), 2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON, TENSORS]


def test_a_directory_without_a_state_says_so(tmp_path: Path) -> None:
    assert not has_state(tmp_path)
    with pytest.raises(ResumeError, match=f"{tmp_path} has no Frostline state"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (JSON, b"", "cannot be read"),
        (JSON, b'{"format": 1, "sha', "cannot be read"),
        (JSON, b"[]", "cannot be read"),
        (JSON, b"\xff\xfe", "cannot be read"),
        (JSON, b'{"format": 99}', "has format 99; this version reads format 1"),
        (JSON, b'{"format": 1, "sha256": "0"}', "cannot be read"),
        (TENSORS, b"", "does not match its checksum"),
        (TENSORS, b"12345678" * 40, "does not match its checksum"),
        (JSON, None, f"{JSON} is missing"),
        (TENSORS, None, f"{TENSORS} is missing"),
    ],
)
def test_a_torn_state_is_recognised(tmp_path: Path, file: str, content: bytes | None, says: str) -> None:
    write(tmp_path, 1)
    assert is_complete(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    assert not is_complete(tmp_path)
    assert has_state(tmp_path)
    with pytest.raises(ResumeError, match=says) as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_changed_bit_is_recognised(tmp_path: Path) -> None:
    write(tmp_path, 1)
    blob = bytearray((tmp_path / TENSORS).read_bytes())
    blob[-1] ^= 1
    (tmp_path / TENSORS).write_bytes(blob)
    with pytest.raises(ResumeError, match="does not match its checksum: the checkpoint is torn"):
        load_state(tmp_path)


def test_the_files_of_two_states_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    os.replace(tmp_path / "b" / TENSORS, tmp_path / "a" / TENSORS)
    assert not is_complete(tmp_path / "a")


@pytest.mark.parametrize("call", ["fsync 1", "replace 1", "fsync 2", "replace 2"])
def test_killed_between_any_two_writes_one_of_the_states_is_left(tmp_path: Path, call: str) -> None:
    """The order of ``save_state``: tensors aside, JSON aside, JSON in place (this decides), tensors in place."""
    write(tmp_path, 1)
    _killed_while_writing(tmp_path, 2, call)
    expected = 2 if call == "replace 2" else 1
    values, tensors = load_state(tmp_path)
    assert values["number"] == expected
    assert torch.equal(tensors["sum"], torch.full((64,), float(expected)))
    write(tmp_path, 3)
    assert load_state(tmp_path)[0] == {"number": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON, TENSORS]


def test_killed_twice_the_state_between_is_left(tmp_path: Path) -> None:
    """The first kill leaves the tensors of state 2 where the tensors of state 3 are laid down."""
    write(tmp_path, 1)
    _killed_while_writing(tmp_path, 2, "replace 2")
    _killed_while_writing(tmp_path, 3, "fsync 1")
    assert load_state(tmp_path)[0] == {"number": 2}


def _killed_while_writing(folder: Path, number: int, call: str) -> None:
    pid = os.fork()
    if pid == 0:
        _die_before(*call.split())
        write(folder, number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def _die_before(name: str, count: str) -> None:
    """Die at the ``count``-th call of ``os.<name>``."""
    original, left = getattr(os, name), [int(count)]

    def wrapper(*args: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    setattr(os, name, wrapper)


def test_killed_at_any_time_one_of_the_states_is_left(tmp_path: Path) -> None:
    """A process that writes state after state, killed again and again: what is there is whole and never a mixture."""
    draw = random.Random(0)
    size, number, kills = 1 << 16, 0, 0
    write(tmp_path, number, size)
    while kills < 30 or number < 5:
        kills += 1
        pid = os.fork()
        if pid == 0:
            for later in range(number + 1, number + 10_000):
                write(tmp_path, later, size)
            os._exit(0)
        time.sleep(draw.uniform(0.005, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        values, tensors = load_state(tmp_path)
        assert values["number"] >= number
        number = values["number"]
        assert torch.equal(tensors["sum"], torch.full((size,), float(number)))
