"""``frostline cache ls``, ``verify`` and ``prune``."""

from __future__ import annotations

from pathlib import Path

from tests.cache.records import filled
from tests.cli.test_cli import invoke


def test_nothing_there(tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert invoke("cache", "ls", "--folder", none) == (0, f"no boundary activations in {none}\n", "")
    assert invoke("cache", "verify", "--folder", none)[0] == 0
    assert "0.0 MiB freed" in invoke("cache", "prune", "--folder", none)[1]


def test_left_over_records_are_listed_checked_and_removed(tmp_path: Path) -> None:
    filled(tmp_path / "left", keep=True).close()
    using = filled(tmp_path / "used")
    code, out, _ = invoke("cache", "ls", "--folder", tmp_path)
    assert code == 0
    left, used = out.splitlines()
    assert "left over" in left
    assert "in use" in used
    assert invoke("cache", "verify", "--folder", tmp_path)[:2] == (
        0,
        f"{tmp_path / 'left'}: 20 records sound, 0 slots without one\n{tmp_path / 'used'}: in use, not checked\n",
    )
    content = bytearray((tmp_path / "left" / "slots.bin").read_bytes())
    content[300] ^= 1
    (tmp_path / "left" / "slots.bin").write_bytes(content)
    code, out, _ = invoke("cache", "verify", "--folder", tmp_path)
    assert code == 1
    assert "19 records sound, 1 slots without one" in out
    assert "would remove" in invoke("cache", "prune", "--folder", tmp_path, "--dry-run")[1]
    assert (tmp_path / "left").exists()
    out = invoke("cache", "prune", "--folder", tmp_path)[1]
    assert f"removed {tmp_path / 'left'}" in out
    assert f"kept {tmp_path / 'used'}: in use" in out
    assert not (tmp_path / "left").exists()
    using.close()
