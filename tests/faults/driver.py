"""Runs in processes of their own, and what a killed and resumed one must share with one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


class Runs:
    """A warm parent (:mod:`tests.faults.child`) that forks a process per run.

    Args:
        folder: where the runs go, each in a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, tuple[Path, float]] = {}
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.child"],
            cwd=ROOT,
            # One thread, or forking would lose the others; the parent's path, so that both test the same Frostline.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def start(
        self,
        name: str,
        variant: str,
        *,
        point: str | None = None,
        seconds: float | None = None,
        sabotage: str | None = None,
    ) -> tuple[bool, float]:
        """Start (or resume) the run ``name``; returns whether it was killed, and the seconds it took.

        Args:
            point: kill it there, see ``child.aim``.
            seconds: kill it after that long.
            sabotage: take something away that resume needs, see ``child.SABOTAGES``.
        """
        folder = self.folder / name
        order = {"folder": str(folder), "variant": variant, "point": point, "seconds": seconds, "sabotage": sabotage}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["status"] in (0, -9), (folder / "output.txt").read_text(encoding="utf-8")[-3000:]
        return answer["status"] == -9, answer["seconds"]

    def reference(self, variant: str) -> tuple[Path, float]:
        """The uninterrupted run: its result and the seconds it took."""
        if variant not in self._references:
            name = f"{variant}-uninterrupted"
            killed, seconds = self.start(name, variant)
            assert not killed
            self._references[variant] = self.folder / name / "result", seconds
        return self._references[variant]

    def differences(self, name: str, variant: str) -> list[str]:
        """What of the run ``name`` is not that of the uninterrupted one; the run's folder is removed if nothing is."""
        expected, found = self.reference(variant)[0], self.folder / name / "result"
        wrong = [] if _bytes(found) == _bytes(expected) else ["weights"]
        a, b = _record(expected), _record(found)
        wrong += [key for key in a if a[key] != b[key]]
        if not wrong:
            self.forget(name)
        return wrong

    def apart(self, name: str, variant: str) -> tuple[list[Any], float, float]:
        """How far the run ``name`` is from the uninterrupted one: moves that differ; relative, losses and weights."""
        expected, found = self.reference(variant)[0], self.folder / name / "result"
        a, b = _record(expected), _record(found)
        moves = [pair for pair in zip_longest(*(r["summary"]["trajectory"] for r in (a, b))) if pair[0] != pair[1]]
        losses = [[e[k] for e in r["log"] for k in ("loss", "eval_loss") if k in e] for r in (a, b)]
        loss = max(abs(y - x) / x for x, y in zip(*losses, strict=True))
        weights = [load_file(result / "weights.safetensors") for result in (expected, found)]
        largest = max(float(w.abs().max()) for w in weights[0].values())
        weight = max(float((weights[1][n] - w).abs().max()) for n, w in weights[0].items()) / largest
        return moves, loss, weight

    def forget(self, name: str) -> None:
        """Remove the folder of the run ``name``."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def _bytes(result: Path) -> bytes:
    return (result / "weights.safetensors").read_bytes()


def _record(result: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((result / "record.json").read_text(encoding="utf-8"))
    return record
