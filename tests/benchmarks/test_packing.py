"""What the packing benchmark says of its runs."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.packing import compared
from benchmarks.table import packing as table


def run(side: str, seed: int, cost: float, losses: dict[int, float], correct: str) -> dict[str, Any]:
    return {
        "side": side, "seed": seed, "mode": "none" if side == "full" else "efficiency", "steps": 10, "correct": correct,
        "cpu_seconds": cost, "rank_seconds": 2 * cost, "seconds": cost, "training_seconds": cost,
        "losses": [list(pair) for pair in losses.items()],
        "stages": [{"ranks": 4, "rows": 2, "samples": 0}, {"ranks": 1, "rows": 8, "samples": 40}],
    }  # fmt: skip


RUNS = [
    run("full", 0, 30.0, {8: 1.0, 16: 0.5}, "1110"),
    run("ours", 0, 10.0, {8: 1.25}, "1100"),
    run("ours", 1, 20.0, {8: 1.0, 16: 0.5}, "1111"),
    run("full", 1, 40.0, {8: 1.0, 16: 0.75}, "1111"),
    run("full", 2, 99.0, {}, "0000"),  # has no other side yet
]


def test_runs_are_compared_seed_by_seed() -> None:
    found = compared(RUNS)
    assert found["ratios"]["cpu_seconds"] == {"median": 2.5, "per_seed": [3.0, 2.0]}
    assert found["largest_gap_of_losses"] == [0.25, 0.25]
    assert found["loss_points"]["per_seed"] == pytest.approx([25.0, 0.0])
    assert compared(RUNS[:1]) == {}


def test_the_table_has_a_row_for_each_pair() -> None:
    machine = {"processor": "some", "threads": 1, "packages": {"torch": "2", "transformers": "5"}}
    report = {
        "settings": {"recipe": "trec", "ranks": 4, "overrides": []}, "runs": RUNS, "comparison": compared(RUNS),
        "environment": machine, "device": "cpu", "date": "today", "command": "python it.py",
    }  # fmt: skip
    lines = list(table(report))
    assert [line for line in lines if line.startswith("| 0 |")] == [
        "| 0 | 3.00x | 3.00x | 3.00x | 1.00x | 10, 10 | 75.0 | 50.0 | 4 x 2 (0), 1 x 8 (40) |"
    ]
    assert any("CPU-seconds 2.50x" in line for line in lines)
