"""``attach``: one line for a Hugging Face Trainer that exists already.

A callback alone cannot do it: ``on_pre_optimizer_step`` comes after clipping, ``on_save`` after old checkpoints
are rotated away, and no event comes between building the optimizer and loading its state. So four methods of
this Trainer (not of its class) are wrapped, and :meth:`Frost.detach` puts them back.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from frostline.adapters.checkpoints import newest_complete
from frostline.adapters.randomness import capture, restore
from frostline.blocks import BlockStack
from frostline.engine import Frostline, Summary, check_cache
from frostline.errors import ConfigError, FrostlineError, ModelError, ResumeError
from frostline.events import EventLog
from frostline.policies.registry import validate
from frostline.state import is_complete

__all__ = ["Frost", "attach"]


def attach(
    trainer: Trainer,
    policy: str = "gradient-norm",
    cache: str = "off",
    *,
    blocks: str | None = None,
    events: EventLog | str | Path | None = None,
    max_depth_changes: int | None = None,
    **options: Any,
) -> Frost:
    """Freeze blocks while ``trainer`` trains.

    Args:
        trainer: any ``transformers.Trainer`` or subclass, before ``train()``.
        policy: name of a policy (``frostline.policies.available()``); ``none`` installs nothing.
        cache: ``off`` until the storage manager is there.
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
    check_cache(cache)
    validate(policy, options)
    frost = Frost(trainer, policy, blocks, events, max_depth_changes, options)
    if policy == "none":
        # Nothing is installed: this engine only answers summary().
        frost.engine = Frostline(trainer.model or nn.Module(), None, policy=policy, steps_per_epoch=1, epochs=1)
    else:
        _refuse(trainer)
        if trainer.model is not None:
            BlockStack.find(trainer.model, blocks)  # say now, not an hour into the job, what cannot be frozen
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
    if trainer.args.ddp_find_unused_parameters is False and trainer.args.world_size > 1:
        raise ModelError("ddp_find_unused_parameters=False expects every gradient at every step: set it to True")


class Frost:
    """Handle of an attached Trainer."""

    def __init__(
        self,
        trainer: Trainer,
        policy: str,
        blocks: str | None,
        events: EventLog | str | Path | None,
        max_depth_changes: int | None,
        options: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.engine: Frostline | None = None
        self.log = events if isinstance(events, EventLog) else EventLog(events)
        self._settings = {"policy": policy, "blocks": blocks, "max_depth_changes": max_depth_changes, **options}
        self._callback = _Callback(self)
        self._wrapped: list[tuple[Any, str]] = []
        self._resume_from: Path | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._saved_epoch_start: dict[str, Any] | None = None
        self._read_this_step = False

    @property
    def depth(self) -> int:
        """Number of leading blocks frozen now."""
        return self.engine.depth if self.engine is not None else 0

    def summary(self) -> Summary:
        """What happened in the last ``train()``; ``print`` it, or read it as a dictionary."""
        if self.engine is None:
            raise FrostlineError("nothing to summarise yet: call trainer.train() first")
        return self.engine.summary()

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

    def _wrap(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        setattr(owner, name, wrapper)
        self._wrapped.append((owner, name))

    def _unwrap_all(self, owner: Any = None) -> None:
        for wrapped, name in list(self._wrapped):
            if owner is None or wrapped is owner:
                wrapped.__dict__.pop(name, None)
                self._wrapped.remove((wrapped, name))

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
            resume_from_checkpoint = str(self._resume_from)
        return original(resume_from_checkpoint, *args, **kwargs)

    def _create_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # An optimizer built now must hold every parameter: an aborted attempt (auto_find_batch_size) left some frozen.
        if self.engine is not None:
            self.engine.finish()
        return original(*args, **kwargs)

    def _save_checkpoint(self, original: Callable[..., Any], model: Any, trial: Any) -> None:
        trainer = self.trainer
        directory = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save and self.engine is not None:
            # A run that was killed here before left a torn directory; nothing of it may mix with this one.
            shutil.rmtree(directory, ignore_errors=True)
            self.engine.log.append(
                "checkpoint", step=self.engine.step, samples=self.engine.samples, path=str(directory)
            )
            self.engine.save(directory, epoch_start=self._epoch_start)
        trainer.accelerator.wait_for_everyone()
        original(model, trial)

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
            events=self.log,
            scaler=getattr(trainer.accelerator, "scaler", None),
            **self._settings,
        )
        self._wrap(trainer.accelerator, "clip_grad_norm_", self._clip)
        self._saved_epoch_start, self._read_this_step = None, False
        if state.global_step > 0 and self._resume_from is not None:
            if is_complete(self._resume_from):
                saved = self.engine.load(self._resume_from)
                if state.global_step % per_epoch:
                    self._saved_epoch_start = saved.get("epoch_start")
            else:
                self.engine.step, self.engine.samples = state.global_step, min(state.global_step * batch, examples)
                self.engine.limit(
                    "resume",
                    f"{self._resume_from} has no Frostline state: freezing starts anew at step {state.global_step}",
                )
        if trainer.neftune_noise_alpha is not None:
            self.engine.limit("neftune", "NEFTune noise ends when the stem freezes: a frozen prefix is deterministic")

    def _epoch(self) -> None:
        # Samplers without a seed of their own draw the epoch's order from the global generators.
        if self._saved_epoch_start is not None:
            restore(self._saved_epoch_start)
            self._saved_epoch_start = None
        self._epoch_start = capture()

    def _step_end(self) -> None:
        if self.engine is not None:
            self.engine.after_step()
            self._read_this_step = False

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

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.frost._step_end()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.frost._end()
