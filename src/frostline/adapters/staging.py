"""A Hugging Face Trainer that trains one stage of a launched run, and stops where the next one begins."""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import seed_worker

from frostline.adapters.checkpoints import newest_complete
from frostline.adapters.huggingface import Frost
from frostline.adapters.measuring import readable
from frostline.distributed import from_first
from frostline.errors import FrostlineError
from frostline.packing import Job, Look, Order, Pace, PackOptions, Stage, Stages, carry, next_stage
from frostline.state import load_state

__all__ = ["Keeper", "behind", "move_on", "ordered_loader"]

# Steps at a new depth before it is looked at, so that their median says what a step takes there; the first ones, which
# build anew what hangs on what trains (buckets, records), are left out.
_SETTLE, _UNSETTLED = 12, 3


def ordered_loader(trainer: Trainer, order: Order) -> DataLoader[Any]:
    """The Trainer's loader of training data, with ``order`` as its sampler of batches."""
    args = trainer.args
    data, collate = readable(trainer)
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    # The order is this rank's already: to Accelerate it is the loader of a single process.
    prepared: DataLoader[Any] = prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True
    )
    return prepared


class Keeper(TrainerCallback):
    """Looks for the next stage when the frost line has moved, and stops the Trainer where it begins.

    Add it after ``attach``, so that it sees what the engine has decided.

    Args:
        frost: of the Trainer.
        stages: of the run so far; what is found goes there and, on the first rank, into their file.
        now: the stage at work, on as many ranks as there are.
        order: of its samples.
        options: what the user wants.
        run: the directory of the run.
        total: samples of the whole run.
        started: when this process began, in seconds since the epoch.

    Attributes:
        following: the next stage, when the Trainer has been stopped for it.
    """

    def __init__(
        self, frost: Frost, stages: Stages, now: Stage, order: Order, options: PackOptions, *, run: Path,
        total: float, started: float,
    ) -> None:  # fmt: skip
        self.following: Stage | None = None
        self._frost, self._stages, self._now, self._order, self._options = frost, stages, now, order, options
        self._run, self._total, self._started, self._restart = run, total, started, options.restart
        self._depth, self._due = 0, False
        self._seconds: deque[float] = deque(maxlen=_SETTLE - _UNSETTLED)
        self._began = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        engine = self._frost.engine
        assert engine is not None, "it comes after Frostline's own callback"
        # What is frozen from the first step on is looked at as well; what has been, is not again.
        self._depth = next((look.depth for look in reversed(self._stages.looks) if look.samples <= engine.samples), 0)
        state.compute_steps(args, state.max_steps)  # intervals are the stage's own
        numbers = self._now.numbers()
        engine.journal.write("stage", begins=numbers.pop("samples"), **numbers)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._restart is None:
            self._restart = time.time() - self._started
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._seconds.append(time.perf_counter() - self._began)
        if self._stages.job is not None and self._frost.depth != self._depth:
            self._due = self._has_settled()
        # At the end of an epoch its evaluation comes first.
        if self._due and state.global_step % self._order.steps:
            self._look(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.following is not None:
            # Stopped inside an epoch, which is not over: the next stage evaluates and saves at its end.
            control.should_evaluate = control.should_save = control.should_log = False
        elif self._due:
            self._look(state, control)

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        assert self._frost.engine is not None
        assert self._stages.job is not None
        samples, self._due = self._frost.engine.samples, False
        self._depth = self._frost.depth
        if state.global_step >= state.max_steps:
            return
        look = self._stages.look_at(samples)
        if look is None:
            job = self._stages.job
            look = from_first(lambda: self._find(job, samples))  # by a clock: the first rank's word is law
            self._stages.looks.append(look)
            if state.is_world_process_zero:
                self._stages.write(self._run)
        self._frost.engine.journal.write("packing", depth=self._depth, taken=look.stage is not None, **look.numbers)
        if look.stage is not None:
            self.following = look.stage
            control.should_save = control.should_training_stop = True

    def _has_settled(self) -> bool:
        """Whether the line has stood still long enough, by samples: a run that a kill takes back looks there again."""
        engine = self._frost.engine
        assert engine is not None
        steps = 0 if self._options.restart == 0 else _SETTLE  # what costs nothing need not be known
        return bool(engine.samples - engine.journal.trajectory[-1]["samples"] >= steps * self._now.batch)

    def _find(self, job: Job, samples: int) -> Look:
        now, depth = self._now, self._frost.depth
        per_row = job.per_row(depth)
        # The rest of a step: the optimizer, the exchange of gradients, what is done once for a batch.
        fixed = statistics.median(self._seconds) - now.accumulation * now.rows * per_row
        return next_stage(
            self._options, self._stages, now, depth=depth, samples=samples, left=round(self._total - samples),
            pace=Pace(fixed, per_row), restart=self._restart or 0.0,
        )  # fmt: skip


def behind(checkpoint: Path | None, stages: Stages) -> Stage | None:
    """The stage that was to follow ``checkpoint`` when a kill came before it could begin."""
    if checkpoint is None:
        return None
    look = stages.look_at(load_state(checkpoint)[0]["samples"])
    due = look is not None and look.stage is not None and look.stage.number == stages.current.number + 1
    return look.stage if look is not None and due else None


def move_on(following: Stage, stages: Stages, checkpoints: Path, run: Path, before: Order, after: Order) -> None:
    """Begin stage ``following`` with the newest checkpoint of the present one. The first rank does this alone.

    Args:
        following: the next stage.
        stages: of the run; the file that lists them decides which is at work.
        checkpoints: the folder of the run's checkpoints.
        run: the directory of the run.
        before: the order of samples at present.
        after: in the next stage.
    """
    now = stages.current
    newest = newest_complete(now.checkpoints(checkpoints), ours=True)
    if newest is None or load_state(newest)[0]["samples"] != following.samples:
        raise FrostlineError(
            f"stage {now.number} ended at {following.samples} samples without a checkpoint: stage {following.number} "
            "cannot begin"
        )
    carry(newest, checkpoints, now, following, before, after)
    stages.stages.append(following)
    stages.write(run)
    for old in now.checkpoints(checkpoints).glob("checkpoint-*"):
        shutil.rmtree(old, ignore_errors=True)
