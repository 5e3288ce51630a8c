"""Jobs side by side on one machine, a thread each, for figures that hang on no clock; what is done is done."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

__all__ = ["abreast"]


def abreast(
    function: Callable[..., Any],
    jobs: Mapping[Any, tuple[Any, ...]],
    done: Callable[[Any, Any], None],
    *,
    at_once: int = 2,
) -> None:
    """Call ``function`` of a module with each job's arguments, ``at_once`` at a time, in processes of their own.

    Args:
        function: what runs; it sets its own threads.
        jobs: arguments by name.
        done: told the name and the result of each job as soon as it ends, so that it can be written down: a run that
            is stopped then goes on with the others.
        at_once: processes; those that follow start fresh, so that no job finds what another has left behind.

    Raises:
        Exception: what a job raised; those that run are waited for, the others are given up.
    """
    context = multiprocessing.get_context("spawn")
    failed: BaseException | None = None
    with ProcessPoolExecutor(at_once, context, max_tasks_per_child=1) as pool:
        running = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        for future in tqdm(as_completed(running), total=len(running), desc="runs"):
            if future.cancelled():
                continue
            if (error := future.exception()) is None:
                done(running[future], future.result())
                continue
            failed = failed or error
            for other in running:
                other.cancel()
    if failed is not None:
        raise failed
