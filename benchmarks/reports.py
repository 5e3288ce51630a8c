"""What every results file says of itself, and how it is written."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from frostline.events import environment

__all__ = ["RESULTS", "accelerator", "made_by", "write"]

RESULTS = Path(__file__).parent / "results"


def accelerator() -> str:
    """The device on which a Trainer trains here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def made_by(script: str, seed: int, device: str) -> dict[str, Any]:
    """The command that runs now, the day, the machine and what it was busy with."""
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "device": device,
        "environment": environment(),
        # Of the whole machine at the start: near 0 on a quiet one.
        "load": os.getloadavg()[0],
    }


def write(report: dict[str, Any], out: Path) -> None:
    """Write a results file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
