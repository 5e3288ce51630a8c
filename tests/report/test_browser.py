"""The report in a real browser: what a reader sees, at a desk, in the dark and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from frostline.report import write_report
from tests.report.browser import CHROMIUM, Browser
from tests.report.sample import RECIPE, write_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]

PLOTS = ["trajectory", "decisions", "loss", "evaluation", "time", "steps"]
# The boxes of the plots that are to be seen at this width, by section.
BOXES = """Object.fromEntries([...document.querySelectorAll('section > figure[role=img]')].map(f => {
  const seen = [...f.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0);
  const r = seen[0].getBoundingClientRect();
  return [f.parentElement.id, {count: seen.length, label: f.getAttribute('aria-label'),
          box: {x: r.x, y: r.y + scrollY, width: r.width, height: r.height}}];
}))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "sample", baseline=True))


def inked(picture: np.ndarray) -> float:
    """Share of pixels that are not the picture's commonest colour."""
    packed = (picture[..., :3] * 255).astype(int) @ np.array([1 << 16, 1 << 8, 1])
    _, counts = np.unique(packed, return_counts=True)
    return 1.0 - counts.max() / counts.sum()


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False), (390, True)])
def test_every_plot_is_drawn(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    plots = browser.evaluate(BOXES)
    assert list(plots) == PLOTS
    for name, plot in plots.items():
        assert plot["count"] == 1, "the wide or the narrow drawing, not both"
        assert plot["label"]
        assert plot["box"]["x"] >= 0
        assert plot["box"]["x"] + plot["box"]["width"] <= width
        assert inked(browser.shot(plot["box"])) > 0.02, f"{name} is blank"


def test_a_drawing_taken_away_is_noticed(browser: Browser, report: Path) -> None:
    browser.open(report, 1200)
    browser.evaluate("document.querySelectorAll('svg > *').forEach(e => e.remove())")
    assert all(inked(browser.shot(plot["box"])) < 0.001 for plot in browser.evaluate(BOXES).values())


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_is_no_wider_than_the_window(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_letters_in_plots_can_be_read_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, 390)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.narrow svg text')].map(t => t.getBoundingClientRect().height)"
        ".filter(h => h > 0)"
    )
    assert min(sizes) >= 9


def test_nothing_is_fetched_and_nothing_complains(browser: Browser, report: Path) -> None:
    browser.open(report, 1200)
    browser.shot()
    outside = [url for url in browser.requests() if not url.startswith(("file:", "data:"))]
    assert outside == []
    assert browser.complaints() == []


def test_a_fetch_would_be_noticed_and_is_refused(browser: Browser, report: Path, tmp_path: Path) -> None:
    page = tmp_path / "tampered.html"
    page.write_text(report.read_text().replace("</main>", "<img src='http://198.51.100.7/x.png'></main>"))
    browser.open(page, 1200)
    assert "Content Security Policy" in " ".join(browser.complaints())


def test_ids_are_unique(browser: Browser, report: Path) -> None:
    browser.open(report, 1200)
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); ids.length - new Set(ids).size"
    assert browser.evaluate(f"(() => {{ {twice.replace('; ids', '; return ids')} }})()") == 0


def test_both_themes_differ_in_paper_and_ink(browser: Browser, report: Path) -> None:
    browser.open(report, 1200)
    light = browser.shot().mean()
    browser.open(report, 1200, dark=True)
    assert light > 0.85
    assert browser.shot()[..., :3].mean() < 0.35


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    evil = "<img src=http://198.51.100.7/x onerror=document.title='owned'>"
    run = write_run(tmp_path / "run", model=evil, recipe={**RECIPE, "model": f"</title>{evil}<script>1</script>"})
    browser.open(write_report(run), 1200)
    assert browser.evaluate("document.title") == "Frostline: run"
    assert browser.evaluate("document.querySelectorAll('img, script').length") == 0
    assert evil in browser.evaluate("document.querySelector('header').textContent")
    assert not [url for url in browser.requests() if url.startswith("http")]
