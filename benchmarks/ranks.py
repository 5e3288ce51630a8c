"""What benchmarks and tests of several ranks share: starting them, a counter of what DDP sends, a digest of weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

__all__ = ["ROOT", "Traffic", "active_bytes", "counted", "digest", "launch", "start"]

ROOT = Path(__file__).parents[1]


def launch(module: str, folder: Path, *, ranks: int = 2, seconds: float = 240) -> list[dict[str, Any]]:
    """What each rank of ``module`` has written as ``rank<n>.json`` into ``folder``; see :func:`start`.

    Raises:
        RuntimeError: a rank failed; the end of what was written to stderr.
    """
    launched = start(module, folder, ranks=ranks, seconds=seconds)
    if launched.returncode:
        raise RuntimeError(f"{module} failed on {ranks} rank(s):\n{launched.stderr[-4000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def start(module: str, folder: Path, *, ranks: int, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run ``module`` on ``folder`` and wait: by itself on one rank, under torchrun on several, a thread each.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``seconds``.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


class Traffic:
    """Bytes of gradients that DDP has handed out for exchange."""

    def __init__(self) -> None:
        self.bytes = 0

    def taken(self) -> int:
        """The bytes since the last call."""
        found, self.bytes = self.bytes, 0
        return found


def counted(traffic, bucket):  # type: ignore[no-untyped-def] # DDP wants no annotations, or those of its own
    """A communication hook that does what DDP does without one, and counts."""
    traffic.bytes += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)


def active_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of what trains."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def digest(model: nn.Module) -> str:
    """Of all weights, bit for bit."""
    parts = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        parts.update(parameter.detach().numpy().tobytes())
    return parts.hexdigest()
