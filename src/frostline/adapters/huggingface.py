"""``attach``: one line for a Hugging Face Trainer that exists already.

A callback alone cannot do it: ``on_pre_optimizer_step`` comes after clipping, ``on_save`` after old checkpoints
are rotated away, and no event comes between building the optimizer and loading its state. So six methods of
this Trainer (not of its class) and one of its accelerator are wrapped, and :meth:`Frost.detach` puts them back.

The Trainer itself does not continue exactly where it was killed (measured with transformers 5.23); mended here:

* an epoch's order is drawn from the random state of its start, which its checkpoints do not hold;
* the evaluation of an epoch's end comes after the checkpoint of its last step, and is lost with what it drew;
* the loss since the last log line is lost, so that the next line is the mean of fewer steps;
* a checkpoint of the last step, inside an epoch, is continued by one step more than ``max_steps``.

Not mended, but said: data that draw random numbers (the batch after a checkpoint is fetched before it) and the
patience of ``EarlyStoppingCallback``.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import has_length

from frostline.adapters.checkpoints import check, newest_complete
from frostline.adapters.fitting import Fitting
from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.cache import CacheSetting, cache_options
from frostline.distributed import RESTLESS, explain
from frostline.engine import Frostline
from frostline.errors import ConfigError, FrostlineError, ModelError, ResumeError
from frostline.events import EventLog
from frostline.memory import MemoryOptions, MemorySetting, memory_options
from frostline.policies.registry import create, validate
from frostline.settings import KEYWORDS
from frostline.state import has_state
from frostline.summary import Summary

__all__ = ["Frost", "attach"]


def attach(
    trainer: Trainer,
    policy: str = "gradient-norm",
    cache: CacheSetting = "off",
    *,
    memory: MemorySetting = "off",
    blocks: str | None = None,
    events: EventLog | str | Path | None = None,
    max_depth_changes: int | None = None,
    **options: Any,
) -> Frost:
    """Freeze blocks while ``trainer`` trains.

    Args:
        trainer: any ``transformers.Trainer`` or subclass, before ``train()``.
        policy: name of a policy (``frostline.policies.available()``); ``none`` installs nothing.
        cache: ``auto`` (where it pays), ``memory`` or ``disk`` keeps boundary activations and skips the frozen prefix;
            ``off``. A mapping sets budgets and more (:class:`~frostline.cache.CacheOptions`).
        memory: level at which the tensors that autograd saves are compressed (``safe``, ``slimfit``, ``published``,
            ``max``), or ``{"budget": "6GiB", "level": ...}``, which fits the run into a budget (at most at that level);
            ``off``. Also with policy ``none``.
        blocks: dotted path of the list of blocks, where the model has several or none is found.
        events: an :class:`EventLog` or the path of ``events.jsonl``; kept in memory if not given.
        max_depth_changes: bound on moves of the frost line (default: 6 under ``torch_compile``, else none).
        options: the policy's own options, e.g. ``percentile=75``.

    Returns:
        A handle: ``depth``, ``summary()``, ``detach()``.

    Raises:
        ConfigError: an unknown policy or option, a value out of range, or a second ``attach``.
        ModelError: a model or a wrapper that cannot be frozen by depth.
    """
    saving, open_option = memory_options(memory), validate(policy, options, KEYWORDS).undecided
    settings = {
        "policy": policy, "cache": cache_options(cache), "blocks": blocks, "max_depth_changes": max_depth_changes,
        **options,
    }  # fmt: skip
    frost = Frost(trainer, events, settings, Fitting(trainer, saving, policy, options, blocks))
    if policy == "none" and saving == MemoryOptions():
        # Nothing is installed: this engine only answers summary().
        frost.engine = Frostline(trainer.model or nn.Module(), None, policy=policy, steps_per_epoch=1, epochs=1)
        return frost
    _refuse(trainer)
    if saving != MemoryOptions() and trainer.args.torch_compile:
        raise ModelError("torch_compile=True: a compiled model is not compressed; drop it, or use memory='off'")
    if trainer.model is not None and policy != "none":
        # Say now, not an hour into the job, what cannot be frozen; the sizes do not matter for that.
        decided = dict(options)
        if open_option is not None and saving.budget is not None:
            del decided[open_option]
        cadence = create(policy, decided, plan_for(BlockStack.find(trainer.model, blocks), 1, 1, 1)).cadence()
        expects_all = trainer.args.ddp_find_unused_parameters is False and trainer.args.world_size > 1
        if expects_all and cadence is not None and cadence.restless:
            raise ModelError(f"policy {policy!r}: {RESTLESS}")
    frost._install()
    return frost


def _refuse(trainer: Trainer) -> None:
    if any(isinstance(callback, _Callback) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this Trainer has Frostline attached already: call detach() on the first handle")
    if trainer.args.n_gpu > 1:
        raise ModelError(
            f"{trainer.args.n_gpu} GPUs in one process give nn.DataParallel, which copies the model at every step, so "
            f"nothing in it can be frozen; start with: torchrun --nproc-per-node={trainer.args.n_gpu} <your script>"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        name = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise ModelError(f"{name} cannot change what is frozen while it trains in this version; use DDP (torchrun)")


class Frost:
    """Handle of an attached Trainer."""

    def __init__(
        self,
        trainer: Trainer,
        events: EventLog | str | Path | None,
        settings: dict[str, Any],
        fitting: Fitting,
    ) -> None:
        self.trainer = trainer
        self.engine: Frostline | None = None
        self.log = events if isinstance(events, EventLog) else EventLog(events)
        self._settings, self._fitting = settings, fitting
        self._callback = _Callback(self)
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._resume_from: Path | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._saved_epoch_start: dict[str, Any] | None = None
        self._read_this_step = False
        self._steps_per_epoch = 1
        self._at_boundary = self._save_due = False
        self._fetched = 0

    @property
    def depth(self) -> int:
        """Number of leading blocks frozen now."""
        return self.engine.depth if self.engine is not None else 0

    def summary(self) -> Summary:
        """What happened in the last ``train()``; ``print`` it, or read it as a dictionary."""
        if self.engine is None:
            raise FrostlineError("nothing to summarise yet: call trainer.train() first")
        found = self.engine.summary()
        if self._fitting.plan is not None:
            found["memory"] = {
                **(found["memory"] or {"level": "off", "kept": None}),
                "plan": self._fitting.plan.numbers(),
            }
        return found

    def detach(self) -> None:
        """Thaw the model and put the Trainer back as it was."""
        if self.engine is not None:
            self.engine.finish()
        self._unwrap_all()
        if self._callback in self.trainer.callback_handler.callbacks:
            self.trainer.remove_callback(self._callback)

    # -- installing -----------------------------------------------------------------------------

    def _install(self) -> None:
        self.trainer.add_callback(self._callback)
        self._wrap(self.trainer, "train", self._train)
        self._wrap(self.trainer, "create_optimizer", self._create_optimizer)
        self._wrap(self.trainer, "_save_checkpoint", self._save_checkpoint)
        self._wrap(self.trainer, "_run_epoch", self._run_epoch)
        self._wrap(self.trainer, "get_batch_samples", self._get_batch_samples)
        self._wrap(self.trainer, "log", self._log)

    def _wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        # A method that somebody else has replaced on this very object comes back at detach().
        self._wrapped.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wrapper)

    def _unwrap_all(self, owner: Any = None) -> None:
        for entry in list(self._wrapped):
            wrapped, name, before = entry
            if owner is None or wrapped is owner:
                vars(wrapped).pop(name, None)
                if before is not None:
                    setattr(wrapped, name, before)
                self._wrapped.remove(entry)

    # -- wrapped methods ------------------------------------------------------------------------

    def _train(
        self, original: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._resume_from = None
        if resume_from_checkpoint:
            output = Path(str(self.trainer.args.output_dir))
            if resume_from_checkpoint is True:
                self._resume_from = newest_complete(output, ours=True)
                if self._resume_from is None:
                    raise ResumeError(f"nothing to resume: no complete checkpoint with Frostline's state in {output}")
            else:
                self._resume_from = Path(resume_from_checkpoint)
            check(self._resume_from, self.trainer.model)
            resume_from_checkpoint = str(self._resume_from)
        try:
            with self._fitting.run(self._resume_from):
                return original(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            explain(error, f"in training, after step {self.trainer.state.global_step}")
            # Whoever catches this (a notebook, a search over settings) goes on with an ordinary model.
            self._end()
            raise

    def _create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # An optimizer built now must hold every parameter: an aborted attempt (auto_find_batch_size) left some frozen.
        if self.engine is not None:
            self.engine.finish()
        return original(*args, **kwargs)

    def _save_checkpoint(self, original: Callable[..., Any], model: Any, trial: Any) -> None:
        trainer = self.trainer
        directory = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        loss = float(trainer.accelerator.reduce(trainer._tr_loss, reduction="mean"))
        if trainer.args.should_save and self.engine is not None:
            # A run that was killed here before left a torn directory; nothing of it may mix with this one. The file
            # that makes it complete goes first: killed in between, it is not taken for a whole one.
            (directory / "trainer_state.json").unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)
            self.engine.journal.write("checkpoint", path=str(directory))
            self.engine.save(
                directory,
                epoch_start=self._epoch_start,
                loss={"sum": loss, "steps": trainer.state.global_step - trainer._globalstep_last_logged},
                memory=self._fitting.plan.numbers() if self._fitting.plan is not None else None,
            )
        trainer.accelerator.wait_for_everyone()
        original(model, trial)

    def _run_epoch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        # Resumed from its very last step, inside an epoch, the Trainer would take one step before it looks.
        if self.trainer.state.global_step >= self.trainer.state.max_steps:
            self.trainer.control.should_training_stop = True
            return
        original(*args, **kwargs)

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # An epoch's first call draws its order; what changes the generators in the second is the data.
        self._fetched += 1
        if self._fetched != 2 or self.engine is None:
            return original(*args, **kwargs)
        before = capture()
        batches = original(*args, **kwargs)
        if capture() != before:
            self.engine.limit(
                "random-inputs",
                "the data draw random numbers (augmentation, masking): the Trainer has fetched a batch ahead when it "
                "saves, so a resumed run sees that one batch otherwise and is not the uninterrupted run bit for bit",
            )
        return batches

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Before the host's trackers see it: TensorBoard and the like plot the frost line beside the loss.
        original({**logs, "frost_depth": self.depth} if "loss" in logs else logs, *args, **kwargs)

    def _clip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._read_gradients()
        return original(*args, **kwargs)

    def _read_gradients(self) -> None:
        if self.engine is not None and not self._read_this_step:
            self.engine.before_step()
            self._read_this_step = True

    # -- events ---------------------------------------------------------------------------------

    def _begin(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        trainer = self.trainer
        self._unwrap_all(trainer.accelerator)
        if self.engine is not None:
            self.engine.finish()
        _, per_epoch, examples, _, batch, _, max_steps = trainer.set_initial_training_values(args, loader)
        self.engine = Frostline(
            trainer.model_wrapped,
            trainer.optimizer,
            steps_per_epoch=per_epoch,
            epochs=max_steps / per_epoch,
            batch_size=batch,
            samples_per_epoch=examples,
            sized=has_length(loader),
            events=self.log,
            scaler=getattr(trainer.accelerator, "scaler", None),
            memory=self._fitting.level,
            **{**self._settings, **self._fitting.options},
        )
        if self._fitting.plan is not None:
            self.engine.journal.write("memory", **self._fitting.plan.numbers())
        self._wrap(trainer.accelerator, "clip_grad_norm_", self._clip)
        self.engine.loader(loader)
        self._steps_per_epoch = per_epoch
        self._saved_epoch_start = None
        self._read_this_step = self._at_boundary = self._save_due = False
        if self._resume_from is not None:
            self._at_boundary = state.global_step % per_epoch == 0
            if has_state(self._resume_from):
                saved = self.engine.load(self._resume_from)
                self._saved_epoch_start = None if self._at_boundary else saved["epoch_start"]
                self._restore_loss(saved["loss"], state.global_step)
            else:
                self._start_anew(state.global_step)
            patient = any(isinstance(c, EarlyStoppingCallback) for c in trainer.callback_handler.callbacks)
            if patient and not args.restore_callback_states_from_checkpoint:
                self.engine.limit(
                    "early-stopping",
                    "the Trainer forgot how long EarlyStoppingCallback has waited: set "
                    "restore_callback_states_from_checkpoint=True to resume with it",
                )
        if trainer.neftune_noise_alpha is not None:
            self.engine.limit("neftune", "NEFTune noise ends when the stem freezes: a frozen prefix is deterministic")

    def _restore_loss(self, saved: dict[str, Any], step: int) -> None:
        trainer = self.trainer
        trainer._tr_loss += saved["sum"]
        trainer._globalstep_last_logged = step - saved["steps"]
        # The mean loss that train() returns is, in the Trainer, that of this call's own steps: it stays so.
        trainer._total_loss_scalar -= saved["sum"]

    def _start_anew(self, step: int) -> None:
        """Freeze from here on, in a run whose first ``step`` steps were not ours."""
        engine = self.engine
        assert engine is not None
        engine.clock.step = step
        cadence = engine.policy.cadence()
        if cadence is not None:
            # Decide at the next mark, not at every step until as many decisions have been taken.
            position = engine.samples if cadence.unit == "samples" else step
            engine.evaluations = int((position + 1e-6) // cadence.every)
        engine.limit("resume", f"{self._resume_from} has no Frostline state: freezing starts anew at step {step}")

    def _epoch(self) -> None:
        # Samplers without a seed of their own draw the epoch's order from the global generators.
        if self._saved_epoch_start is not None:
            restore(self._saved_epoch_start)
            self._saved_epoch_start = None
        if self._at_boundary:
            self._restore_boundary()
            self._at_boundary = False
        self._epoch_start = capture()
        self._fetched = 0

    def _restore_boundary(self) -> None:
        # The Trainer does this only after on_epoch_begin: too late for what the next checkpoint says of this epoch.
        self.trainer._load_rng_state(str(self._resume_from))

    def _step_end(self, state: TrainerState, control: TrainerControl) -> None:
        if self.engine is not None:
            self.engine.after_step()
            self._read_this_step = False
        if control.should_save and self._ends_epoch(state):
            # Not before the epoch's own evaluation and log line, which a run resumed from here would never make up.
            control.should_save, self._save_due = False, True

    def _ends_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self._steps_per_epoch == 0 or state.global_step >= state.max_steps

    def _epoch_end(self, control: TrainerControl) -> None:
        if self._save_due:
            control.should_save, self._save_due = True, False

    def _end(self) -> None:
        self._unwrap_all(self.trainer.accelerator)
        if self.engine is not None:
            self.engine.finish()


class _Callback(TrainerCallback):
    """Passes the Trainer's events on."""

    def __init__(self, frost: Frost) -> None:
        self.frost = frost

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.frost._begin(args, state, kwargs["train_dataloader"])

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.frost._epoch()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.frost._read_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.frost._step_end(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.frost._epoch_end(control)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.frost._end()
