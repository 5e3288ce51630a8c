"""``report.html``: what it says, what it must never do. How it looks is in test_browser.py."""

from __future__ import annotations

import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from frostline.errors import FrostlineError
from frostline.events import EventLog
from frostline.report import load_run, write_report
from frostline.report.plots import decision_cells
from tests.report.sample import LIMIT, RECIPE, write_run


class Page(HTMLParser):
    """The page as sections of text, its tables, and the tags that were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag in ("tr", "caption"):
            self._rows.append([])
        if tag in ("td", "th", "caption"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "caption"):
            self._cell = False
        elif tag == "table":
            self.tables[self._rows[0][0]] = self._rows[1:]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine", baseline=True)


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    target = write_report(path)
    assert target == path / "report.html"
    return Page(target)


def test_the_trajectory_is_in_a_table(page: Page) -> None:
    assert page.tables["Trajectory"] == [
        ["from sample", "from step", "depth"],
        ["0", "0", "0"],
        ["960", "60", "1"],
        ["1,280", "80", "2"],
        ["1,600", "100", "3"],
        ["1,920", "120", "4"],
        ["2,240", "140", "5"],
    ]


def test_every_decision_has_its_numbers(page: Page, path: Path) -> None:
    decisions = load_run(path).decisions
    taken, changes, scores = (
        page.tables[name][1:] for name in ("Decisions", "Relative change per block", "Statistic per block")
    )
    assert len(taken) == len(changes) == len(scores) == len(decisions) == 20
    for event, row, change, score in zip(decisions, taken, changes, scores, strict=True):
        explanation = event["explanation"]
        threshold = "-" if explanation["threshold"] is None else f"{explanation['threshold']:.5g}"
        assert row == [
            str(event["evaluation"]), f"{event['samples']:,}", f"{event['step']:,}", str(event["depth_before"]),
            str(event["depth"]), "-", threshold, explanation["reason"],
        ]  # fmt: skip
        for cells, numbers in ((change, explanation["changes"]), (score, event["observation"]["scores"])):
            known = {int(block): f"{value:.5g}" for block, value in numbers.items()}
            assert cells[1:] == [known.get(block, "-") for block in range(6)]


def test_the_heat_map_holds_change_over_threshold(path: Path) -> None:
    run = load_run(path)
    values, states, relative = decision_cells(run)
    assert relative
    event = run.decisions[2]
    change, threshold = event["explanation"]["changes"]["4"], event["explanation"]["threshold"]
    assert 2 ** values[4, 2] == pytest.approx(change / threshold)
    for column, entry in enumerate(run.decisions):
        assert (states[:, column] == 1).sum() == entry["depth_before"]
        below = range(entry["depth_before"], entry["depth"])
        assert all(values[block, column] < 0 for block in below), "what froze lies below the threshold"


def test_losses_evaluations_time_and_steps_of_both_sides(page: Page, path: Path) -> None:
    run = load_run(path)
    assert run.baseline is not None
    for label, side in (("gradient-norm", run), ("baseline", run.baseline)):
        losses = page.tables[f"Training loss, {label}"][1:]
        assert [row[2] for row in losses] == [f"{event['loss']:.5g}" for event in side.select("loss")]
        evaluations = page.tables[f"Evaluations, {label}"]
        assert evaluations[0] == ["sample", "step", "accuracy", "loss"]
        assert [row[2] for row in evaluations[1:]] == [
            f"{event['metrics']['eval_accuracy']:.5g}" for event in side.select("evaluation")
        ]
        intervals = page.tables[f"Intervals, {label}"][1:]
        for row, event in zip(intervals, side.select("interval"), strict=True):
            bound = event["bound_seconds"]
            assert row == [
                f"{event['samples']:,}", str(event["depth"]), str(event["steps"]),
                f"{1000 * event['step_seconds']:.2f}", "-" if bound is None else f"{1000 * bound:.2f}",
                "-" if bound is None else "1.042",
            ]  # fmt: skip
    seconds = {row[0]: row[1:] for row in page.tables["Seconds"]}
    assert seconds["phase"] == ["gradient-norm", "baseline"]
    for phase in ("train", "statistics", "decide", "evaluate", "save", "other", "total"):
        assert seconds[phase] == [f"{side.seconds[phase]:.2f}" for side in (run, run.baseline)]


def test_comparison_limits_and_environment(page: Page) -> None:
    beside = {row[0]: row[1:] for row in page.tables["The run and its baseline"]}
    assert beside["test accuracy"] == ["0.9400", "0.9450"]
    assert beside["training speed-up over mine/baseline"] == ["1.68x", "1.00x"]
    facts = {row[0]: row[1] for row in page.tables["The run"]}
    assert facts["seed"] == "3"
    assert facts["stack"] == "bert.encoder.layer (6 blocks)"
    environment = {row[0]: row[1] for row in page.tables["Environment"]}
    assert environment["processor"] == "Test CPU"
    assert environment["torch"] == "2.13.0"
    limits = page.text[page.text.index("Limits") :]
    assert LIMIT in limits


def test_what_the_cache_did_and_what_it_cost(tmp_path: Path) -> None:
    write_run(tmp_path)
    counts = {"hits": 60, "upgrades": 20, "misses": 20, "written": 40, "full": 1, "dropped": 2, "stale": 3, "torn": 0}
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["cache"] = {**counts, "lost": 0, "records": 20, "bytes": 3 << 20, "stopped": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    check = {"action": "check", "depth": 2, "noise": 0.0, "difference": 1e-7, "refusal": None}
    price = {"action": "price", "depth": 2, "visits": 3, "computing": 0.002, "writing": 1e-4, "nbytes": 2048.0}
    log = EventLog(tmp_path / "events.jsonl")
    for numbers in (
        {**check, "codec": "int8", "error": 0.004, "error_output": 0.01},
        {**price, "tier": "memory", "reading": 0.001, "keep": True, "disk": None, "proved": False},
        {**price, "tier": "disk", "reading": float("inf"), "keep": True, "disk": False, "proved": False},
    ):
        log.append("cache", step=3, samples=48, **numbers)
    page = Page(write_report(tmp_path))
    assert "80% of the 100 samples that met the frost line had a record" in page.text
    (table,) = [rows for caption, rows in page.tables.items() if caption.startswith("Checks before the first hit")]
    assert table[1][-1] == "used in int8, which costs 0.004"
    (table,) = [rows for caption, rows in page.tables.items() if caption.startswith("What a record costs")]
    assert table[1] == ["48", "2", "memory", "2", "0.1", "1", "2", "used"]
    assert table[2][5:] == ["inf", "2", "does not pay: not used"]


def test_the_page_stands_alone_and_every_plot_has_words(page: Page) -> None:
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert all(not (attributes.get("src") or "").startswith("http") for _, attributes in page.tags)
    links = [attributes.get("href") or attributes.get("xlink:href") or "" for _, attributes in page.tags]
    assert all(link.startswith(("#", "data:")) for link in links if link)
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    assert len(figures) == 6
    assert all(len(attributes["aria-label"] or "") > 30 for attributes in figures)
    assert any("1 from sample 960" in (attributes["aria-label"] or "") for attributes in figures)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> \" onload='x' $\\frac{1}{$"
    path = write_run(tmp_path / "run", model=evil, recipe={**RECIPE, "model": evil}, baseline=True)
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "limit":
            event["message"] = evil
        if event["event"] == "decision":
            event["explanation"]["reason"] = evil
        if event["event"] == "evaluation":
            event["metrics"] = {evil: 0.5}
        if event["event"] == "run":
            event["environment"] = {"processor": evil, "packages": {evil: evil}}
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    summary = json.loads((path / "summary.json").read_text())
    summary.update(metrics={evil: 0.5}, limits=[evil], policy={"name": evil, "options": {evil: evil}})
    (path / "summary.json").write_text(json.dumps(summary))
    text = write_report(path).read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(path / "report.html")
    assert all("onload" not in attributes for _, attributes in page.tags)
    assert evil in page.text


def test_a_killed_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", killed_after=170)))
    assert "This run has not ended" in page.text
    assert "logged up to step 170" in page.text
    assert len(page.tables["Decisions"]) == 1 + 8


@pytest.mark.parametrize("policy", ["none", "static", "ramp", "random-blocks"])
def test_every_policy_has_a_report(tmp_path: Path, policy: str) -> None:
    options = {"static": {"depth": 3}, "random-blocks": {"active": 2, "every": 5}}.get(policy, {})
    page = Page(write_report(write_run(tmp_path / "run", policy, options=options)))
    if policy in ("none", "static"):
        assert f"Policy {policy} took no decisions" in page.text
    if policy == "random-blocks":
        assert [row[5] for row in page.tables["Decisions"][1:]] == ["4"] * 80


def test_a_run_killed_before_anything_was_logged(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", killed_after=1)))
    for line in ("took no decisions", "No training loss", "has not been evaluated", "No step times"):
        assert line in page.text


def test_numbers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    decisions = [event for event in events if event["event"] == "decision"]
    decisions[1]["explanation"]["changes"].update({"0": "inf", "1": 0.0, "2": "nan"})
    decisions[2]["explanation"]["threshold"] = 0.0
    next(event for event in events if event["event"] == "loss")["loss"] = "nan"
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = Page(write_report(path))
    assert page.tables["Relative change per block"][2][1:4] == ["inf", "0", "nan"]
    assert page.tables["Training loss, gradient-norm"][1][2] == "nan"


def test_long_tables_are_thinned_and_say_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "random-blocks", options={"active": 1, "every": 1})
    loss = {"event": "loss", "time": 0.0, "step": 1, "samples": 16, "loss": 1.0, "learning_rate": 0.1, "epoch": 0.0}
    with (path / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(loss) + "\n" for _ in range(1000))
    tables = Page(write_report(path)).tables
    caption = next(name for name in tables if name.startswith("Training loss"))
    assert "one row in 3; events.jsonl has all 1,040" in caption
    assert len(tables[caption]) == 1 + 347


def test_the_report_is_put_in_place_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_report(path)
    before = target.read_text()

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(FrostlineError, match="cannot write .*report.html.*No space left"):
        write_report(path)
    assert target.read_text() == before
    assert [entry.name for entry in path.iterdir() if entry.name.endswith(".tmp")] == []


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "frostline.report.plots", raising=False)
    monkeypatch.delattr("frostline.report.plots", raising=False)
    with pytest.raises(FrostlineError, match=rf"needs {package}: pip install 'frostline\[report\]'"):
        write_report(path)
