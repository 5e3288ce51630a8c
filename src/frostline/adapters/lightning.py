"""``FrostlineCallback``: the engine behind a Lightning ``Callback``.

``on_before_optimizer_step`` comes after the gradients are accumulated and unscaled and before clipping, which is
where statistics are read; a step is counted when ``trainer.global_step`` has moved.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from frostline.cache import CacheSetting, cache_options
from frostline.engine import COMPILED_DEPTH_CHANGES, NOT_CACHED_COMPILED, Frostline
from frostline.errors import ConfigError, FrostlineError, ModelError
from frostline.events import EventLog
from frostline.memory import NO_BUDGET, MemorySetting, memory_options
from frostline.policies.registry import validate
from frostline.settings import KEYWORDS
from frostline.summary import Summary

__all__ = ["FrostlineCallback"]


class FrostlineCallback(pl.Callback):
    """Freezes blocks of a ``LightningModule`` while it trains.

    Args:
        policy: name of a policy (``frostline.policies.available()``); ``none`` does nothing.
        cache: ``auto`` (where it pays), ``memory`` or ``disk`` keeps boundary activations and skips the frozen prefix;
            ``off``. A mapping sets budgets and more (:class:`~frostline.cache.CacheOptions`).
        memory: level at which the tensors that autograd saves are compressed (``safe``, ``slimfit``, ``published``,
            ``max``); ``off``. Also with policy ``none``. A budget needs a Hugging Face Trainer or a recipe.
        blocks: dotted path of the list of blocks inside the LightningModule, where it is not found by itself.
        events: an :class:`EventLog` or the path of ``events.jsonl``.
        max_depth_changes: bound on moves of the frost line (default: 6 for a compiled module, else none).
        options: the policy's own options, e.g. ``percentile=75``.

    Raises:
        ConfigError: an unknown policy or option, a value out of range, or a memory budget.
    """

    def __init__(
        self,
        policy: str = "gradient-norm",
        cache: CacheSetting = "off",
        *,
        memory: MemorySetting = "off",
        blocks: str | None = None,
        events: EventLog | str | Path | None = None,
        max_depth_changes: int | None = None,
        **options: Any,
    ) -> None:
        validate(policy, options, KEYWORDS)
        saving = memory_options(memory)
        if saving.budget is not None:
            raise ConfigError(NO_BUDGET)
        self.engine: Frostline | None = None
        self._log = events if isinstance(events, EventLog) else EventLog(events)
        self._settings = {
            "policy": policy, "cache": cache_options(cache), "memory": saving, "blocks": blocks, **options,
        }  # fmt: skip
        self._max_depth_changes = max_depth_changes
        self._saved: dict[str, Any] | None = None
        self._counted = 0

    @property
    def depth(self) -> int:
        """Number of leading blocks frozen now."""
        return self.engine.depth if self.engine is not None else 0

    def summary(self) -> Summary:
        """What happened in the last ``fit()``."""
        if self.engine is None:
            raise FrostlineError("nothing to summarise yet: call trainer.fit() first")
        return self.engine.summary()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            name = type(trainer.strategy).__name__
            raise ModelError(f"{name} cannot change what is frozen while it trains in this version; use strategy='ddp'")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ModelError(f"{len(trainer.optimizers)} optimizers: Frostline freezes for exactly one")
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        if not 0 < total < math.inf:
            raise ConfigError(
                "the length of the run is unknown: give the Lightning Trainer max_steps or a sized loader"
            )
        # A loader without a length has no epochs: the run is one.
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else int(total)
        per_epoch = max(1, per_epoch)
        batch, samples = _sizes(trainer, per_epoch)
        # Lightning compiles the module's methods in place, where the engine does not see it.
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        moves = COMPILED_DEPTH_CHANGES if self._max_depth_changes is None and compiled else self._max_depth_changes
        self.engine = Frostline(
            trainer.model or pl_module,
            trainer.optimizers[0],
            steps_per_epoch=per_epoch,
            epochs=float(total) / per_epoch,
            batch_size=batch,
            samples_per_epoch=samples,
            sized=math.isfinite(batches),
            events=self._log,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            max_depth_changes=moves,
            **self._settings | ({"cache": "off"} if compiled else {}),
        )
        if compiled and self._settings["cache"].mode != "off":
            self.engine.limit("cache-compiled", NOT_CACHED_COMPILED)
        self._counted = trainer.global_step
        if self._saved is not None:
            self.engine.load_state_dict(self._saved)
            self._saved = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.engine is not None:
            self.engine.before_step(unscaled=True)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.engine is not None:
            # Manual optimization may take several steps in one batch.
            for _step in range(trainer.global_step - self._counted):
                self.engine.after_step()
            self._counted = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.engine is not None:
            self.engine.finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.engine is not None:
            self.engine.finish()

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoint: tensors and JSON values."""
        return self.engine.state_dict() if self.engine is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the optimizer exists; applied before the first forward."""
        self._saved = state_dict or None


def _sizes(trainer: pl.Trainer, per_epoch: int) -> tuple[int, int]:
    """Samples per optimizer step over all ranks, and per epoch; 1 a step where the loader does not say."""
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    if size is None:
        return 1, per_epoch
    step = int(size) * trainer.accumulate_grad_batches * trainer.world_size
    try:
        return step, min(len(loader.dataset), per_epoch * step)
    except (TypeError, AttributeError):
        return step, per_epoch * step
