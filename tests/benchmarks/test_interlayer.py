"""``benchmarks/interlayer.py`` and ``drift.py``: how rates are chosen, runs paired, and a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.abreast import abreast
from benchmarks.memory_tables import drift as drift_table
from benchmarks.memory_tables import interlayer as interlayer_table
from benchmarks.reports import accelerator

from benchmarks import drift, interlayer


class Lab:
    """Runs that come out as a function of side, rate and seed, in place of real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, best: Mapping[str, float], *, dies_after: int = 10**9) -> None:
        self.best, self.left = best, dies_after
        self.ran: list[tuple[str, float, int, float]] = []
        self.within: list[str] = []
        monkeypatch.setattr(interlayer, "abreast", self.abreast)

    def abreast(
        self, function: Any, jobs: Mapping[Any, Any], done: Callable[[Any, Any], None], *, at_once: int
    ) -> None:
        for key, (_, side, rate, seed, share, within) in jobs.items():
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.within.append(within)
            self.ran.append((side, rate, seed, share))
            done(key, self.run(side, rate, seed, share))

    def run(self, side: str, rate: float, seed: int, share: float) -> dict[str, Any]:
        # At the smaller share the best rate is the same, and does a little better.
        accuracy = 1.0 - abs(np.log2(rate / self.best[side])) / 10 - share / 100
        right = np.random.default_rng(seed).random(200) < (0.9 if side == "full" else 0.8)
        return {
            "seed": seed,
            "device": accelerator(),
            "validation": {"accuracy": accuracy, "loss": 1.0},
            "correct": "".join(str(int(r)) for r in right),
        }


def test_rates_are_tuned_beyond_the_grid_where_the_best_lies_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(monkeypatch, {"full": 5e-5, "ours": 1e-2})
    out = tmp_path / "interlayer.json"
    assert interlayer.main(["--tasks", "trec", "--out", str(out)]) == 0
    task = json.loads(out.read_text())["tasks"]["trec"]
    # The grid is 5e-5, 1e-4, 2e-4: below and above it the next is tried, twice at most.
    assert task["rates"] == {"full": 5e-5, "ours": 8e-4}
    assert task["at_the_end"] == {"full": False, "ours": True}
    assert task["shares"] == {"full": 0.0, "ours": 0.75}
    assert sorted(t["rate"] for t in task["tuning"] if t["side"] == "full") == [2.5e-5, 5e-5, 1e-4, 2e-4]
    for share in (0.9, 0.75):
        assert len([t for t in task["tuning"] if t["share"] == share]) == 5
    assert {seed for _, _, seed, _ in lab.ran[:14]} == {interlayer.TUNING_SEED}
    assert [seed for _, _, seed, _ in lab.ran[14:]] == [0, 0, 1, 1, 2, 2]
    assert {share for side, _, _, share in lab.ran[14:] if side == "ours"} == {0.75}


def test_a_tie_goes_to_the_smaller_loss() -> None:
    tried = [{"rate": rate, "validation": {"accuracy": 0.9, "loss": loss}} for rate, loss in ((1, 2.0), (2, 1.0))]
    assert interlayer._best(tried)["rate"] == 2


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "interlayer.json"
    arguments = ["--tasks", "trec", "movie", "--out", str(out)]
    best = {"full": 1e-4, "ours": 1e-4}
    whole = Lab(monkeypatch, best)
    interlayer.main(arguments)
    expected = json.loads(out.read_text())
    out.unlink()
    ran = []
    for _ in range(30):
        lab = Lab(monkeypatch, best, dies_after=2)
        try:
            interlayer.main(arguments)
            break
        except KeyboardInterrupt:
            ran += lab.ran
    assert sorted(ran + lab.ran) == sorted(whole.ran)
    found = json.loads(out.read_text())
    assert found["pooled"] == expected["pooled"]
    assert found["pooled"]["tasks"] == ["trec", "movie"]


def test_the_loss_is_pooled_over_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lab(monkeypatch, {"full": 1e-4, "ours": 1e-4})
    out = tmp_path / "interlayer.json"
    interlayer.main(["--tasks", "trec", "movie", "--out", str(out)])
    report = json.loads(out.read_text())
    one = report["tasks"]["trec"]["comparison"]["loss_points"]
    pooled = report["pooled"]
    assert one["mean"] == pytest.approx(10, abs=6)
    assert pooled["mean"] == pytest.approx(one["mean"])  # both tasks came out alike
    assert pooled["met"] is None, "three tasks are missing"
    widths = [high - low for low, high in (one["interval_95"], pooled["interval_95"])]
    assert widths[1] < 0.85 * widths[0], "two tasks tell more than one"
    assert "| trec |" in "\n".join(interlayer_table(report))


@pytest.mark.parametrize(("within", "name"), [("model", ""), ("kind", "-kind")])
def test_another_share_takes_the_runs_of_full_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str, name: str
) -> None:
    monkeypatch.setattr(interlayer, "RESULTS", tmp_path)
    lab = Lab(monkeypatch, {"full": 1e-4, "ours": 4e-4})
    interlayer.main(["--tasks", "trec"])
    lab.ran.clear()
    lab.within.clear()
    interlayer.main(["--tasks", "trec", "--share", "0.5", "--within", within])
    assert lab.ran == [("ours", 2e-4, seed, 0.5) for seed in range(3)], "between the rates that were found"
    assert set(lab.within) == {within}
    report = json.loads((tmp_path / f"interlayer-share-0.5{name}.json").read_text())
    assert ("a share of each kind" in "\n".join(interlayer_table(report))) == (within == "kind")
    interlayer.main(["--tasks", "trec", "--share", "0.5", "--within", within, "--seeds", "4"])
    assert [side for side, *_ in lab.ran[3:]] == ["full", "ours"], "what there is counts"


def test_another_share_can_be_tuned_to_its_best_of_two_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interlayer, "RESULTS", tmp_path)
    lab = Lab(monkeypatch, {"full": 1e-4, "ours": 4e-4})
    interlayer.main(["--tasks", "trec"])
    lab.ran.clear()
    lab.within.clear()
    lab.best = {"full": 1e-4, "ours": 1e-4}
    arguments = ["--tasks", "trec", "--share", "0.34", "--within", "kind", "--rate", "tuned"]
    interlayer.main(arguments)
    assert lab.ran[:2] == [("ours", 1e-4, interlayer.TUNING_SEED, 0.34), ("ours", 2e-4, interlayer.TUNING_SEED, 0.34)]
    assert lab.ran[2:] == [("ours", 1e-4, seed, 0.34) for seed in range(3)], "full fine-tuning's rate did better"
    assert set(lab.within) == {"kind"}
    report = json.loads((tmp_path / "interlayer-share-0.34-kind-tuned.json").read_text())
    table = "\n".join(interlayer_table(report))
    assert "(end)" not in table, "none is tried beyond the two"
    assert "--share 0.34 --within kind --rate tuned`" in table
    interlayer.main(arguments)
    assert len(lab.ran) == 5, "what is done is done"


def test_another_share_can_keep_the_rate_of_full_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interlayer, "RESULTS", tmp_path)
    lab = Lab(monkeypatch, {"full": 1e-4, "ours": 4e-4})
    interlayer.main(["--tasks", "trec"])
    lab.ran.clear()
    interlayer.main(["--tasks", "trec", "--share", "0.34", "--rate", "same"])
    assert lab.ran == [("ours", 1e-4, seed, 0.34) for seed in range(3)]
    assert (tmp_path / "interlayer-share-0.34-same.json").is_file()


@pytest.mark.parametrize("arguments", [["--rate", "same"], ["--rate", "tuned", "--share", "0"], ["--within", "kind"]])
def test_what_does_not_go_together_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        interlayer.main(arguments)
    assert "goes with" in capsys.readouterr().err


def test_runs_of_another_device_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interlayer, "RESULTS", tmp_path)
    lab = Lab(monkeypatch, {"full": 1e-4, "ours": 4e-4})
    interlayer.main(["--tasks", "trec"])
    tuned = tmp_path / "interlayer.json"
    report = json.loads(tuned.read_text())
    next(run for run in report["tasks"]["trec"]["runs"] if run["side"] == "full")["device"] = "another"
    tuned.write_text(json.dumps(report))
    lab.ran.clear()
    interlayer.main(["--tasks", "trec", "--share", "0.5"])
    assert [side for side, *_ in lab.ran].count("full") == 1


def test_with_nothing_at_rest_it_is_full_fine_tuning_at_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interlayer, "RESULTS", tmp_path)
    lab = Lab(monkeypatch, {"full": 1e-4, "ours": 4e-4})
    interlayer.main(["--tasks", "trec"])
    lab.ran.clear()
    interlayer.main(["--tasks", "trec", "--share", "0"])
    assert lab.ran == [("ours", 1e-4, seed, 0.0) for seed in range(3)]
    report = json.loads((tmp_path / "interlayer-share-0.json").read_text())
    assert "nothing rests, activations compressed" in "\n".join(interlayer_table(report))

    given: list[list[str]] = []
    monkeypatch.setattr(interlayer, "one_run", lambda name, changes, seed, threads: given.append(changes))
    for side, share in (("full", 0.0), ("ours", 0.0), ("ours", 0.5)):
        interlayer._run("trec", side, 1e-4, 0, share, "kind")
    # The recipe has a policy of its own.
    assert [[c for c in changes if c.startswith(("freeze", "memory"))] for changes in given] == [
        ["freeze={policy: none}"],
        ["memory.level=slimfit", "freeze={policy: none}"],
        ["memory.level=slimfit", "freeze={policy: interlayer, share: 0.5, within: kind}"],
    ]


def test_levels_are_compared_with_the_exact_runs_of_the_same_seeds() -> None:
    def run(level: str, seed: int, loss: float) -> dict[str, Any]:
        return {"level": level, "seed": seed, "loss": loss, "accuracy": 0.9}

    runs = [run("off", 0, 1.0), run("off", 1, 1.2), run("safe", 0, 1.05), run("safe", 1, 1.25), run("max", 0, 2.0)]
    found = drift.compare([*runs, run("max", 7, 0.0)])
    assert found["safe"]["loss"]["apart"] == pytest.approx(0.05)
    assert found["safe"]["loss"]["distance"] == pytest.approx(0.05)
    assert found["safe"]["loss"]["spread"] == pytest.approx(0.2)
    assert found["safe"]["loss"]["met"]
    assert found["max"]["seeds"] == [0], "a seed without an exact run is left out"
    assert found["max"]["loss"]["apart"] == pytest.approx(1.0)
    assert not found["max"]["loss"]["met"]
    machine = {"processor": "a processor", "threads": 1, "packages": {"torch": "1"}}
    settings = {"recipe": "trec", "steps": 500}
    report = {"settings": settings, "levels": found, "device": "cpu", "date": "today", "command": "make"}
    assert "| safe |" in "\n".join(drift_table({**report, "environment": machine}))


def double(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    return 2 * number


def test_jobs_side_by_side() -> None:
    found: dict[str, int] = {}
    abreast(double, {"a": (1,), "b": (2,), "c": (3,)}, found.__setitem__)
    assert found == {"a": 2, "b": 4, "c": 6}
    found.clear()
    with pytest.raises(ValueError, match="negative"):
        abreast(double, {"bad": (-1,), "good": (5,)}, found.__setitem__)
    assert found == {"good": 10}, "what runs beside it is not lost"
