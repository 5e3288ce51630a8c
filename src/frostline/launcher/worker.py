"""One process of a launched recipe: ``python -m frostline.launcher.worker``, started by the launcher."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from frostline.clock import process_start
from frostline.errors import FrostlineError, RankError
from frostline.launcher.verdict import Verdict
from frostline.packing import Stages
from frostline.recipes.ranks import is_first, ranks
from frostline.recipes.runner import run_stage
from frostline.recipes.schema import Recipe, load_recipe
from frostline.recipes.staged import Launch

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Train the stage that is at work, and leave a verdict."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--launch", required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--per-host", type=int, required=True)
    parser.add_argument("--must-stay", action="store_true")
    parser.add_argument("--verdict", type=Path, required=True)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    earlier = Verdict.read(given.verdict)
    if earlier is not None:
        # A rank has said why it cannot go on; its end took this one along, and the agent has started all anew.
        sys.exit(_exit_code(earlier))
    _end_with_the_launcher()
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or Accelerate joins no ranks
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        result = run_stage(recipe, Launch(given.launch, given.stage, given.per_host), started=process_start())
        if result is not None:
            verdict = Verdict("finished", run=str(result.directory), first=is_first(), ranks=ranks())
        else:
            verdict = Verdict(
                "moved on", stays=_stays(recipe, given.per_host, given.must_stay), first=is_first(),
                ranks=ranks(), run=str(recipe.directory),
            )  # fmt: skip
    except RankError:
        raise  # another rank has died: the agent starts all again
    except FrostlineError as error:
        if os.environ.get("FROSTLINE_DEBUG") == "1":
            raise
        verdict = Verdict("failed", str(error), first=is_first(), ranks=ranks())
    # Of a failure each rank tells, of all else one rank of each host.
    if verdict.status == "failed" or os.environ.get("LOCAL_RANK", "0") == "0":
        verdict.write(given.verdict)
    if dist.is_initialized():
        dist.destroy_process_group()
    _leave(_exit_code(verdict))


def _leave(code: int) -> None:
    """End this process once Python has ended its part, without taking down the threads that libraries have in C++.

    Now and then one of them is not done in time, and the process that has done its work aborts ("terminate called
    without an active exception"): the agent would take the stage for one that has failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(verdict: Verdict) -> int:
    """A failure is told by the verdict, so that the agent need not try again; other hosts can tell it by this alone."""
    return int(verdict.status == "failed" and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1)


def _end_with_the_launcher() -> None:
    """A launcher that is killed takes its processes along: each has a session of its own, so no signal reaches them."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stays(recipe: Recipe, per_host: int, must_stay: bool) -> bool:
    """Whether this host takes part in the next stage: the one that all meet at does, then those of the lowest ranks."""
    host = int(os.environ.get("GROUP_RANK", "0"))
    hosts: list[tuple[bool, int]] = sorted(gather_object([(not must_stay, host)]))
    stages = Stages.read(recipe.directory)
    assert stages is not None, "the next stage has been written"
    needed = -(-stages.current.ranks // per_host)
    kept = list(dict.fromkeys(number for _, number in hosts))[:needed]
    return host in kept


if __name__ == "__main__":
    main()
