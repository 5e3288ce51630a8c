"""Starting a test module on several real ranks: as benchmarks do."""

from __future__ import annotations

from benchmarks.ranks import ROOT, launch, start

__all__ = ["ROOT", "launch", "start"]
