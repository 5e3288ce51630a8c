"""Two jobs that take turns on one machine, a few seconds each, as if each had it alone.

A shared machine drifts by a tenth within minutes, so that two runs of minutes each, one after the other, do not
compare.
Here each job is a process; the others stand still (SIGSTOP) while one runs, and its clocks stand still with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

__all__ = ["Job", "in_turns"]


class Job(NamedTuple):
    """A function of a module, its arguments, and the seconds of a turn: long against what changing turns costs."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float


def in_turns(jobs: Mapping[str, Job]) -> dict[str, Any]:
    """Run jobs in turns, in the order given; their results by name.

    Raises:
        RuntimeError: a job has failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    turns = {name: _Turn(context, job) for name, job in jobs.items()}
    found: dict[str, Any] = {}
    try:
        while waiting := [name for name in turns if name not in found]:
            for name in waiting:
                turn = turns[name]
                turn.go()
                # The last one has the machine to itself.
                if turn.ends_within(None if len(waiting) == 1 else jobs[name].seconds):
                    found[name] = turn.result(name)
                else:
                    turn.stop()
    finally:
        for turn in turns.values():
            turn.process.kill()
            turn.process.join()
    return found


class _Turn:
    """A job's process, standing still."""

    def __init__(self, context: Any, job: Job) -> None:
        self._stood = context.RawValue("d", 0.0)
        self._results, inner = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(job.function, job.arguments, self._stood, inner))
        self.process.start()
        inner.close()
        self._since = 0.0
        self.stop()

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        self._since = time.perf_counter()

    def go(self) -> None:
        self._stood.value += time.perf_counter() - self._since
        os.kill(self.process.pid, signal.SIGCONT)

    def ends_within(self, seconds: float | None) -> bool:
        return bool(self._results.poll(seconds))

    def result(self, name: str) -> Any:
        try:
            return self._results.recv()
        except EOFError:
            raise RuntimeError(f"{name} failed") from None
        finally:
            self.process.kill()  # what it does to end would take the others' time


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], stood: Any, results: Connection) -> None:
    """In the child: clocks that do not count the time for which the process stood still."""
    for clock in ("perf_counter", "time"):
        setattr(time, clock, _standing(getattr(time, clock), stood))
    results.send(function(*arguments))


def _standing(clock: Callable[[], float], stood: Any) -> Callable[[], float]:
    def now() -> float:
        while True:
            before = stood.value
            moment = clock()
            if stood.value == before:  # else it was stopped between the two
                return moment - before

    return now
