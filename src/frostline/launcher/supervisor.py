"""The launcher: one run of torch's elastic agent for each stage, until the recipe is done.

Processes that die are the agent's business: it starts those of the stage again, and they go on from its last
checkpoint. Between two stages every host reads the same plan; hosts that the next one does not need leave.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from frostline.errors import ConfigError, FrostlineError, ResumeError
from frostline.launcher.verdict import Verdict
from frostline.packing import Entry, Stage, Stages, note
from frostline.recipes.schema import load_recipe
from frostline.recipes.staged import check

__all__ = ["Hosts", "launch"]

WORKER = "frostline.launcher.worker"
# For the first host to come to the place where all meet.
_PATIENCE = timedelta(minutes=15)


@dataclass(frozen=True)
class Hosts:
    """Where a recipe is to run.

    Attributes:
        per_host: processes on each host.
        least, most: hosts.
        endpoint: host and port at which they meet; needed for more than one.
        name: of the launch, the same on all hosts; needed for more than one.
    """

    per_host: int
    least: int = 1
    most: int = 1
    endpoint: str = ""
    name: str = ""

    @classmethod
    def parse(cls, per_host: int, nodes: str, endpoint: str = "", name: str = "") -> Hosts:
        """From what a user says; ``nodes`` is a number or ``MIN:MAX``.

        Raises:
            ConfigError: numbers below 1, or several hosts that are not told where to meet.
        """
        bounds = nodes.split(":")
        try:
            least, most = (int(bound) for bound in (bounds[0], bounds[-1]))
        except ValueError:
            least = most = 0
        if len(bounds) > 2 or not 1 <= least <= most:
            raise ConfigError(f"--nnodes={nodes}: say a number of hosts, or MIN:MAX with 1 <= MIN <= MAX")
        if per_host < 1:
            raise ConfigError(f"--nproc-per-node={per_host}: a host runs at least one process")
        if most > 1 and not (endpoint and name):
            raise ConfigError(
                f"--nnodes={nodes}: several hosts must meet; give all of them the same --rdzv-endpoint HOST:PORT and "
                "--rdzv-id NAME"
            )
        return cls(per_host, least, most, endpoint, name)


class _Meeting:
    """Where hosts meet, for the whole launch: a store of the stage's own would go with the stage.

    Attributes:
        here: whether this host holds it.
        name: of this launch, unlike any other, the same on all hosts.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.here, self.name = True, uuid.uuid4().hex
        if hosts.most == 1:
            return
        host, _, port = hosts.endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--rdzv-endpoint={hosts.endpoint}: say HOST:PORT")
        settings: dict[str, Any] = {"multi_tenant": True, "wait_for_workers": False, "timeout": _PATIENCE}
        try:
            self._store = TCPStore(host, int(port), is_master=True, **settings)
        except (RuntimeError, ValueError):  # the address is another host's, or another launcher here holds it
            self.here = False
            try:
                self._store = TCPStore(host, int(port), is_master=False, **settings)
            except RuntimeError as error:
                raise FrostlineError(f"--rdzv-endpoint={hosts.endpoint}: nobody is there: {error}") from None
        key = f"frostline/{hosts.name}"
        if self.here:
            self._store.set(key, self.name)
        self.name = f"{hosts.name}-{self._store.get(key).decode()}"


def launch(
    recipe: str,
    overrides: Sequence[str],
    hosts: Hosts,
    *,
    max_restarts: int = 3,
    say: Callable[[str], None] = print,
) -> Path | None:
    """Run ``recipe`` on ``hosts``, stage after stage.

    Args:
        recipe: a shipped recipe's name or a YAML file.
        overrides: settings over the recipe's.
        hosts: this one and the others.
        max_restarts: how often the processes of a stage may be started again.
        say: told what happens between the stages.

    Returns:
        The directory of the run; ``None`` where this host has left before the end.

    Raises:
        FrostlineError: what a user can act on; processes that died too often.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
    """
    settings = load_recipe(recipe, list(overrides))
    check(settings)
    meeting = _Meeting(hosts)
    stages = Stages.read(settings.directory) if settings.resume else None
    stage = stages.current if stages is not None else None
    while True:
        verdict = _run_stage(settings.directory, [recipe, *overrides], hosts, meeting, stage, max_restarts)
        if verdict.status == "failed":
            raise FrostlineError(verdict.message)
        run, before = Path(verdict.run), stage
        if verdict.status == "finished":
            return run
        stages = Stages.read(run)
        assert stages is not None, "every launched run has its stages"
        stage, ended = stages.current, before or stages.stages[0]
        say(
            f"stage {stage.number} at {stage.samples} samples, depth {stage.depth}: {_ranks(stage)}, "
            f"micro-batches of {stage.rows}, batch {stage.batch} (before: {_ranks(ended)}, batch {ended.batch})"
        )
        if not verdict.stays:
            say("this host is not needed any more")
            return None


def _run_stage(
    run: Path, arguments: Sequence[str], hosts: Hosts, meeting: _Meeting, stage: Stage | None, max_restarts: int
) -> Verdict:
    """The verdict on a stage (``None``: the first). What it took is noted however it ends."""
    number = stage.number if stage is not None else 0
    per_host = min(hosts.per_host, stage.ranks) if stage is not None else hosts.per_host
    most = -(-stage.ranks // hosts.per_host) if stage is not None else hosts.most
    # Or processes that are started again read from the agent's store where those before them listened (torch 2.13).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // per_host)))
    with tempfile.TemporaryDirectory(prefix="frostline-launch-") as folder, _own_signals():
        path = Path(folder) / "verdict.json"
        config = LaunchConfig(
            min_nodes=min(hosts.least, most),
            max_nodes=most,
            nproc_per_node=per_host,
            run_id=f"{meeting.name}-{number}",
            rdzv_backend="c10d",
            rdzv_endpoint=hosts.endpoint or "localhost:0",
            rdzv_configs={"is_host": meeting.here},
            max_restarts=max_restarts,
        )
        worker = ["-m", WORKER, "--launch", meeting.name, "--stage", str(number), "--per-host", str(hosts.per_host)]
        worker += ["--must-stay"] if meeting.here else []
        started, cpu = time.monotonic(), _cpu_seconds()
        try:
            elastic_launch(config, sys.executable)(*worker, "--verdict", str(path), *arguments)
            verdict = Verdict.read(path)
        except ChildFailedError as error:
            verdict = Verdict.read(path)
            if verdict is None or verdict.status != "failed":
                raise FrostlineError(_died(error, max_restarts)) from None
        except RendezvousError as error:
            raise FrostlineError(f"the hosts have not met: {error}") from None
        except SignalException:
            raise KeyboardInterrupt("stopped; the same command with resume=true goes on") from None
        finally:
            _note(run, meeting.name, number, Verdict.read(path), time.monotonic() - started, _cpu_seconds() - cpu)
        if verdict is None:
            raise FrostlineError("the processes of the stage ended without saying how")
        return verdict


def _note(run: Path, name: str, number: int, verdict: Verdict | None, seconds: float, cpu_seconds: float) -> None:
    """Note what a stage took, on the host of the first rank; of processes that did not say, what was planned."""
    with contextlib.suppress(ResumeError):
        stages = Stages.read(run)
        begun = stages is not None and stages.launch == name  # or another run is there, and this one was refused
        if stages is not None and begun and (verdict is None or (verdict.first and verdict.status != "failed")):
            stage = stages.stages[number]
            ranks = verdict.ranks if verdict is not None else stage.ranks
            note(run, Entry(number, ranks, stage.batch, seconds, cpu_seconds))


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """The agent sets handlers, and leaves them."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _died(error: ChildFailedError, max_restarts: int) -> str:
    rank, failure = error.get_first_failure()
    return (
        f"rank {rank} ended with exit code {failure.exitcode} once too often (--max-restarts={max_restarts}); what it "
        "said is above; the same command with resume=true goes on from the last checkpoint"
    )


def _ranks(stage: Stage) -> str:
    return f"{stage.ranks} rank{'s' if stage.ranks > 1 else ''}"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
