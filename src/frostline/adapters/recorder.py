"""What a recipe's run records of a Hugging Face Trainer: events, where the time goes, one progress bar.

The runner adds a :class:`Recorder` to both sides, with freezing and without, so that both are measured alike. It
times between the Trainer's events only and touches neither model nor optimizer; a step costs it some microseconds.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from frostline.adapters.huggingface import Frost
from frostline.clock import Clock
from frostline.events import PHASES, EventLog, environment

__all__ = ["Recorder", "plain_metrics"]

_INTERVALS_PER_EPOCH = 5
_RECENT = 50  # steps whose median is shown
_REFERENCE = 200  # steps at depth 0 whose median the bound is taken from
_REFRESH = 0.25  # seconds between two paintings of the figures
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def plain_metrics(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The results among a Trainer's metrics: without the prefix, the epoch and the timings."""
    short = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
    return {name: value for name, value in short.items() if name != "epoch" and name not in _TIMINGS}


class Recorder(TrainerCallback, ExportableState):
    """Writes ``loss``, ``evaluation``, ``interval`` and ``end`` events (docs/architecture.md) and shows progress.

    Add it before ``attach``, so that it sees the end of a step before the engine acts on it.

    Args:
        log: the run's event log, the one that the engine writes too.
        title: what the progress bar calls this run.
        plain: no engine is at work (policy ``none``): the recorder then writes ``run``, ``checkpoint`` and ``resume``
            as well, and cuts the log back to the checkpoint when the run resumes.
        earlier: seconds that went by for this run before the recorder was made (imports, data).
        on_first_step: called once, when the first optimizer step is done.
        epoch: samples in an epoch, where that is less than the data hold.
        shown: whether there is a progress bar.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        title: str,
        plain: bool,
        earlier: float = 0.0,
        on_first_step: Callable[[], None] | None = None,
        epoch: int | None = None,
        shown: bool = True,
    ) -> None:
        self.log, self.title, self.plain = log, title, plain
        self._epoch, self._shown = epoch, shown
        self.frost: Frost | None = None
        self.steps = self.samples = 0
        self.metrics: dict[str, Any] = {}
        self.metrics_step = -1
        self._earlier, self._created = earlier, time.perf_counter()
        self._on_first_step = on_first_step
        self._bar: tqdm[Any] | None = None
        self._painted = 0.0
        self._loss = math.nan
        self._reset()

    def _reset(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._closed = dict.fromkeys(PHASES, 0.0)
        self._mark = time.perf_counter()
        self._waited = 0.0
        self._depth = 0
        self._step_seconds: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._reference: deque[float] = deque(maxlen=_REFERENCE)

    def watch(self, frost: Frost) -> None:
        """Read depth and the engine's own seconds from ``frost``, the handle of the attached Trainer."""
        self.frost = frost

    # -- state that travels in the checkpoint's trainer_state.json ----------------------------------

    def state(self) -> dict[str, Any]:
        """What a resumed run continues from; the Trainer stores it, :meth:`on_train_begin` takes it back."""
        return {
            "args": {},
            "attributes": {
                "steps": self.steps,
                "samples": self.samples,
                "log_offset": self.log.offset(),
                "elapsed": self._elapsed(),
                "spent": self._split(),
                "closed": dict(self._closed),
                "depth": self._depth,
                "step_seconds": list(self._step_seconds),
                "reference": list(self._reference),
                "metrics": self.metrics,
                "metrics_step": self.metrics_step,
            },
        }

    def _restore(self, saved: dict[str, Any], step: int) -> None:
        # The Trainer counts in steps of this stage, where a run has several: see frostline.packing.
        self._ahead = saved["steps"] - step
        self._clock.resume(saved["steps"], saved["samples"])
        self._earlier += saved["elapsed"]
        self._spent, self._closed, self._depth = dict(saved["spent"]), dict(saved["closed"]), saved["depth"]
        # The engine restores its own counters; kept here too they would count twice.
        self._spent["train"] += self._spent["statistics"] + self._spent["decide"]
        self._spent["statistics"] = self._spent["decide"] = 0.0
        self._step_seconds = list(saved["step_seconds"])
        self._reference.extend(saved["reference"])
        self.metrics, self.metrics_step = saved["metrics"], saved["metrics_step"]

    # -- the Trainer's events -----------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs["train_dataloader"]
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        per_epoch = max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
        # Nobody asks it how many epochs are left.
        self._clock, self._ahead = Clock(per_epoch, 1, batch, self._epoch or len(loader.dataset)), 0
        self._interval_steps = max(1, round(per_epoch / _INTERVALS_PER_EPOCH))
        self._reset()
        # Read from a checkpoint it is a dictionary of states; at a fresh start it holds the callbacks' first ones.
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__) if isinstance(states, dict) else None
        if isinstance(saved, dict) and not saved["attributes"]["steps"]:
            saved = None
        if isinstance(saved, dict):
            self._restore(saved["attributes"], state.global_step)
        self._count(state)
        if self.plain:
            self._log_plain_start(kwargs["model"], saved)
        self.close()
        # A log file gets a line now and then, a terminal a moving bar.
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
            disable=not self._shown,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def _log_plain_start(self, model: Any, saved: Any) -> None:
        if isinstance(saved, dict):
            self.log.rewind(saved["attributes"]["log_offset"])
            self.log.append("resume", step=self.steps, samples=self.samples, path=f"checkpoint-{self.steps}")
            return
        self.log.append(
            "run", step=0, samples=0, policy={"name": "none", "options": {}}, model=type(model).__name__,
            stack=None, blocks=0, plan=None, environment=environment(),
        )  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        depth = self.frost.depth if self.frost is not None else 0
        if depth != self._depth or len(self._step_seconds) >= self._interval_steps:
            self._close_interval()
        if depth != self._depth:
            self._depth = depth
            self._recent.clear()
        self._waited = self._lap("train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = self._waited + self._lap("train")
        self._count(state)
        self._step_seconds.append(seconds)
        self._recent.append(seconds)
        if self._depth == 0:
            self._reference.append(seconds)
        if self._on_first_step is not None:
            self._on_first_step()
            self._on_first_step = None
        if self._bar is not None:
            if self._mark - self._painted > _REFRESH:
                self._painted = self._mark
                self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self._loss = float(logs["loss"])
            self.log.append(
                "loss", step=self.steps, samples=self.samples, loss=self._loss,
                learning_rate=logs.get("learning_rate"), epoch=state.epoch,
            )  # fmt: skip
            self._lap("other")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._lap("evaluate")
        metrics = plain_metrics(kwargs.get("metrics") or {}, "eval")
        event = self.log.append("evaluation", step=self.steps, samples=self.samples, metrics=metrics, epoch=state.epoch)
        self.metrics, self.metrics_step = event["metrics"], self.steps

    def on_predict(self, *_: Any, **__: Any) -> None:
        self._lap("evaluate")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._lap("save")
        if self.plain:
            self.log.append("checkpoint", step=self.steps, samples=self.samples, path=f"checkpoint-{state.global_step}")

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._lap("other")

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._lap("other")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._lap("other")
        if self._step_seconds:
            self._close_interval()
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
        self.close()

    # -- for the runner -----------------------------------------------------------------------------

    def saved(self) -> None:
        """The model has been saved: count the time since the last event as such."""
        self._lap("save")

    def finish(self) -> dict[str, float]:
        """Write the ``end`` event; returns the seconds of every phase and their ``total``."""
        self._lap("other")
        total, split = self._elapsed(), self._split()
        split["other"] = max(0.0, total - sum(split[phase] for phase in PHASES if phase != "other"))
        seconds = {**split, "total": total}
        self.log.append("end", step=self.steps, samples=self.samples, seconds=seconds)
        return seconds

    def close(self) -> None:
        """Take the progress bar away; also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # -- inside -------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return self._earlier + time.perf_counter() - self._created

    def _lap(self, phase: str) -> float:
        """Count the time since the last event for ``phase``."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._spent[phase] += seconds
        return seconds

    def _count(self, state: TrainerState) -> None:
        self._clock.step = self.steps = state.global_step + self._ahead
        self.samples = self._clock.samples

    def _split(self) -> dict[str, float]:
        """Seconds per phase so far. The engine's work happens inside the step: it is taken out of ``train``."""
        split = dict(self._spent)
        if self.frost is not None and self.frost.engine is not None:
            for phase, seconds in self.frost.engine.seconds.items():
                split[phase] += seconds
                split["train"] -= seconds
        return split

    def _bound(self) -> float | None:
        """Seconds of a step at this depth by design: (3N - 2k) / 3N of this run's own step at depth 0.

        With a cache (3N - 3k) / 3N: every sample read. ``None`` where the run never trained at depth 0. Embeddings
        and head are left out of the formula.
        """
        engine = self.frost.engine if self.frost is not None else None
        if not self._reference:
            return None
        if engine is None or not self._depth:
            return statistics.median(self._reference)
        blocks, cached = len(engine.stack), engine.cache is not None and engine.cache.stopped is None
        return statistics.median(self._reference) * (1 - (3 if cached else 2) * self._depth / (3 * blocks))

    def _close_interval(self) -> None:
        split = self._split()
        if self._step_seconds:
            self.log.append(
                "interval", step=self.steps, samples=self.samples, depth=self._depth, steps=len(self._step_seconds),
                seconds={phase: split[phase] - self._closed[phase] for phase in PHASES},
                step_seconds=statistics.median(self._step_seconds), bound_seconds=self._bound(),
            )  # fmt: skip
            self._closed = split
        self._step_seconds = []

    def _figures(self) -> str:
        if not self._recent:
            return ""
        engine = self.frost.engine if self.frost is not None else None
        blocks = len(engine.stack) if engine is not None and not self.plain else 0
        parts = [f"depth {self._depth}/{blocks}"] if blocks else []
        bound = self._bound()
        limit = f" (bound {bound:.3f})" if bound is not None else ""
        parts.append(f"{statistics.median(self._recent):.3f} s/step{limit}")
        if not math.isnan(self._loss):
            parts.append(f"loss {self._loss:.3f}")
        return ", ".join(parts)
