"""``benchmarks/memory.py`` and ``gradients.py`` on tiny shapes: they measure, and what they measure makes sense."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gradients import compare
from benchmarks.memory import main, measure_memory
from benchmarks.memory_tables import budgets as budget_table
from benchmarks.memory_tables import gradients, memory, memory_time
from benchmarks.modes import MODES

from benchmarks import budgets, modes
from tests.memory.steps import everything_packs

OPTIONS = Namespace(shape="bert", rows=4, length=32, seed=0, device="cpu", rounds=2, autocast=False)
MACHINE = {"processor": "a processor", "threads": 1, "packages": {"torch": "1"}}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import transformers

    whole = transformers.BertConfig

    def tiny(**options: Any) -> transformers.BertConfig:
        return whole(
            vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=32, **options,
        )  # fmt: skip

    monkeypatch.setattr(transformers, "BertConfig", tiny)
    with everything_packs():
        yield


def test_every_way_is_smaller_where_it_says_so() -> None:
    found = {name: measure_memory(mode, OPTIONS)[0] for name, mode in MODES.items()}
    full = found["full"]
    for name in ("resting 0.9", "half frozen", "half frozen, cached", "gradient checkpointing", "LoRA r=8"):
        assert found[name]["saved"] < full["saved"], name
        packed = found.get(f"{name} + slimfit")
        assert packed is None or packed["saved"] < 0.5 * found[name]["saved"], name
    assert found["full + slimfit"]["peak"] < full["peak"]
    assert found["resting 0.9"]["usual"] <= found["resting 0.9"]["peak"]
    assert found["resting 0.9, moments of active layers + slimfit"]["moments"] < 0.5 * full["moments"]
    assert full["moments"] == pytest.approx(2 * full["weights"], rel=0.01)
    report = {"shape": "bert", "rows": 4, "length": 32, "device": "cpu", "date": "today", "command": "make"}
    table = "\n".join(memory({**report, "environment": MACHINE, "modes": list(found.values())}))
    assert "| resting 0.9 + max |" in table


def test_a_run_that_was_stopped_goes_on_after_the_last_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def child(command: list[str], **_: Any) -> Namespace:
        name = command[command.index("--mode") + 1]
        if len(ran) == 3:
            ran.append("stop")
            return Namespace(returncode=1, stdout="", stderr="killed")
        ran.append(name)
        return Namespace(returncode=0, stdout=json.dumps({"mode": name}) + "\n", stderr="")

    monkeypatch.setattr(subprocess, "run", child)
    arguments = ["bert", "--rows", "4", "--length", "32", "--out", str(tmp_path / "memory.json")]
    with pytest.raises(SystemExit, match="killed"):
        main(arguments)
    assert not (tmp_path / "memory.json").exists()
    assert main(arguments) == 0
    assert [name for name in ran if name != "stop"] == list(MODES)
    assert [row["mode"] for row in json.loads((tmp_path / "memory.json").read_text())["modes"]] == list(MODES)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    ("named", "timed"),
    [
        ([], {"full", "resting 0.9", "half frozen", "gradient checkpointing"}),
        (["--modes", "LoRA r=8", "half frozen, cached"], {"LoRA r=8", "half frozen, cached"}),
        (["--modes", "resting 0.9, moments of active layers"], {"resting 0.9, moments of active layers"}),
    ],
)
def test_four_ways_are_timed_or_those_that_are_named(tmp_path: Path, named: list[str], timed: set[str]) -> None:
    out = tmp_path / "memory_time.json"
    arguments = ["bert", "--part", "time", "--rows", "4", "--length", "32", "--rounds", "2", "--out", str(out)]
    assert main([*arguments, *named]) == 0
    report = json.loads(out.read_text())
    assert {row["mode"] for row in report["modes"]} == timed
    assert all(row["ratio"]["pairs"] == 2 for row in report["modes"])
    assert all(f"| {mode} | slimfit |" in "\n".join(memory_time(report)) for mode in timed)


def test_ways_that_are_compressed_are_not_timed_against_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bert", "--part", "time", "--modes", "full", "full + max"])
    assert "without a level, not full + max" in capsys.readouterr().err


def test_the_fastest_way_in_each_budget() -> None:
    chosen = ("full", "full, 4 micro-batches", "half frozen, cached, resting 0.9 + slimfit")
    ways = [budgets.measure(name, OPTIONS) for name in chosen]
    whole, split, combined = ways
    assert combined["saved"] < 0.5 * whole["saved"]
    assert combined["peak"] < split["peak"] < whole["peak"]
    assert combined["cached"] > 0
    assert all(way["time"]["pairs"] == 2 for way in ways)
    rows = budgets.best([{**way, "peak": way["peak"] * budgets.GIB / whole["peak"]} for way in ways])
    (first,) = [row for row in rows if row["budget"] == budgets.GIB]
    last = rows[-1]
    assert first["half frozen, cached, resting 0.9"]["way"] == chosen[2]
    assert first["LoRA r=8"] is None
    assert last["full"]["way"] == min(ways[:2], key=lambda way: way["time"]["median"])["mode"]
    report = {"shape": "bert", "rows": 4, "length": 32, "device": "cpu", "date": "today", "command": "make"}
    shown = "\n".join(budget_table({**report, "environment": MACHINE, "modes": ways, "best": rows}))
    assert "| 1.00 GiB |" in shown


def test_a_compressed_way_has_to_be_clearly_faster() -> None:
    def chosen(seconds: float) -> str:
        ways = [
            {"mode": level, "kind": "full", "level": level, "peak": 1, "time": {"median": time}}
            for level, time in (("off", 1.0), ("slimfit", seconds))
        ]
        found: str = budgets.best(ways)[0]["full"]["way"]
        return found

    assert (chosen(0.97), chosen(0.9)) == ("off", "slimfit")


def test_cosines_by_part() -> None:
    training = modes.build(MODES["full"], "bert", 4, 32, 0, "cpu")
    found = compare(training.model, [training.inputs])
    assert list(found["safe"]["cosines"]) == ["stem", "block 0", "block 1", "block 2", "block 3", "head"]
    assert min(found["safe"]["cosines"].values()) > 0.999
    assert found["slimfit"]["smaller"] > found["safe"]["smaller"] > 2
    assert all(torch.tensor(list(row["cosines"].values())).isfinite().all() for row in found.values())
    report = {
        "recipe": "r",
        "model": "m",
        "steps": 1,
        "batches": 1,
        "device": "cpu",
        "date": "today",
        "command": "make",
    }
    assert found["slimfit"]["resting"] != found["slimfit"]["cosines"], "four bits for norms at rest"
    assert all(parameter.requires_grad for parameter in training.model.parameters())
    assert "| safe, norms at rest | - |" in "\n".join(gradients({**report, "environment": MACHINE, "levels": found}))
