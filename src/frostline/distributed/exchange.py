"""What is said where another rank does not come to an exchange.

torch names the operation that gave up ("Timed out waiting 1800000ms for recv operation to complete"), and neither who
waited, nor for what, nor where the time-out is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from frostline.errors import RankError

__all__ = ["exchange", "explain"]


@contextmanager
def exchange(purpose: str) -> Iterator[None]:
    """Around an exchange of Frostline's own.

    Args:
        purpose: what the ranks exchange something for, and when: ``to agree on what freezes after step 7``.

    Raises:
        RankError: another rank did not take part, or not in time.
    """
    try:
        yield
    except RuntimeError as error:
        if _alone(error):
            raise RankError(f"{_waited(purpose)}. torch says: {error}") from error
        raise


def explain(error: BaseException, where: str) -> None:
    """Note on ``error`` who waited, if it is torch's in an exchange of the host: its kind stays what hosts expect.

    Args:
        error: that ended a run.
        where: ``in training, after step 7``.
    """
    if dist.is_available() and dist.is_initialized() and not isinstance(error, RankError) and _alone(error):
        error.add_note(_waited(where))


def _alone(error: BaseException) -> bool:
    """Whether another rank did not come, by what torch says."""
    # NCCL's errors are of a class of their own; gloo's are not, and begin with the file of gloo that raised them.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _waited(what_for: str) -> str:
    return (
        f"rank {dist.get_rank()} of {dist.get_world_size()} waited for another rank {what_for}, and it did not come: "
        "it hangs, or has ended (its own output says why). Where ranks may be apart for longer than the time-out of "
        "the process group, raise that: ddp_timeout=<seconds> of the Trainer, or init_process_group(timeout=...)"
    )
