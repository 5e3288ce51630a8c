"""What each rank of ``test_lost.py`` runs: training in which one rank sleeps for longer than the others wait.

Started under torchrun with two ranks; each writes ``rank<n>.json`` into the folder it is given, except where the
folder is called ``trainer``: there a Trainer ends the run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

import frostline
from tests.adapters.hosts import batches, bert, trainer_for

# Seconds. Ranks that come at about the same time must not miss each other on a busy machine: up to the step in which
# one sleeps they meet in the default group as well, which waits for half an hour.
TIMEOUT, SLEEP = 6, 12
TRAINER_TIMEOUT, FOR_EVER = 8, 300
# ``sleeper`` sleeps before ``before`` in the second step: after which the first decision is due.
CASES: dict[str, dict[str, Any]] = {
    "decision": {"sleeper": 0, "before": "after_step"},
    "backward": {"sleeper": 1, "before": "backward"},
}


def _loop(sleeper: int, before: str) -> str | None:
    """A plain loop; the error with which it ended on this rank."""
    rank, group = dist.get_rank(), dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    model = bert()
    dist.barrier()
    ddp = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(ddp, optimizer, evaluations_per_epoch=4, steps_per_epoch=8, epochs=1)

    def sleep(moment: str) -> None:
        if (rank, moment, frost.step) == (sleeper, before, 1):
            time.sleep(SLEEP)

    try:
        for batch in batches(4)[rank::2]:
            if frost.step < 2:
                dist.barrier()
            model.train()
            loss = ddp(**batch).loss
            sleep("backward")
            loss.backward()
            frost.before_step()
            optimizer.step()
            optimizer.zero_grad()
            sleep("after_step")
            frost.after_step()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return None


class Sleep(transformers.TrainerCallback):
    """The second rank never comes back from its data."""

    def on_step_begin(self, _: Any, state: transformers.TrainerState, *__: Any, **___: Any) -> None:
        if not state.is_world_process_zero and state.global_step == 2:
            time.sleep(FOR_EVER)


def _trainer(folder: Path, rank: int) -> None:
    # One rank may have imported everything long before the other, which is no part of training.
    (folder / f"here{rank}").touch()
    while not (folder / f"here{1 - rank}").exists():
        time.sleep(0.05)
    # On a CPU transformers does not hand ddp_timeout on; a group that is there already it takes as it is.
    dist.init_process_group("gloo", timeout=timedelta(seconds=TRAINER_TIMEOUT))
    trainer = trainer_for(folder)
    trainer.add_callback(Sleep())
    frostline.attach(trainer, evaluations_per_epoch=4)
    trainer.train()


def main(folder: Path) -> None:
    """Run the Trainer, or every loop and write how it ended."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rank = int(os.environ["RANK"])
    if folder.name == "trainer":
        _trainer(folder, rank)
        return
    dist.init_process_group("gloo")
    found: dict[str, str | None] = {}
    for name, case in CASES.items():
        found[name] = _loop(**case)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
