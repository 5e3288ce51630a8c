"""Reading finished, running and killed runs: comparing, reporting, replaying."""

from frostline.report.compare import Comparison, compare
from frostline.report.html import write_report
from frostline.report.replay import Replay, ReplayStep, replay
from frostline.report.run import Run, load_run

__all__ = [
    "Comparison",
    "Replay",
    "ReplayStep",
    "Run",
    "compare",
    "load_run",
    "replay",
    "write_report",
]
