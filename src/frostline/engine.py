"""``Frostline``: observe -> decide -> apply, and the whole state for resume.

The engine knows optimizer steps and samples, not hosts: the adapters call :meth:`Frostline.before_step` when the
accumulated gradient is there and not yet clipped, and :meth:`Frostline.after_step` when the step is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.cache import CacheManager, CacheOptions, CacheSetting, cache_options, watched
from frostline.clock import Clock
from frostline.distributed import NOT_CACHED_SPLIT, NOT_COMPRESSED_SPLIT, UNEVEN, Agreement, Upkeep, is_split
from frostline.errors import ConfigError, ModelError, ResumeError
from frostline.events import EventLog
from frostline.freezer import Freezer
from frostline.journal import Journal
from frostline.memory import NO_BUDGET, Compressor, MemorySetting, memory_options, refuse_compiled
from frostline.policies.base import Decision, Explained, Observation
from frostline.policies.registry import create, validate
from frostline.state import fingerprint, load_state, save_state
from frostline.statistics import Measurements, learning_rate
from frostline.summary import Summary
from frostline.trace import has_compiled, is_compiled

__all__ = ["Frostline"]

# torch.compile falls back to eager after 8 recompiles of one function (torch._dynamo.config.recompile_limit);
# shapes that turn dynamic take some of them.
COMPILED_DEPTH_CHANGES = 6
NOT_CACHED_COMPILED = (
    "compiled in place, or around DistributedDataParallel: boundary activations are not cached; "
    "use model = torch.compile(model)"
)
NOT_LOOKED = (
    "an optimizer step was counted without before_step(): what its gradients say is not measured, and the policy goes "
    "by what it knows; call before_step() between backward() and the optimizer's step(), before zero_grad()"
)
NOT_COMPRESSED = (
    "a step has come to its end, and no training pass of the model was seen: nothing is compressed; does the loop call "
    "the module that Frostline was given?"
)


class Frostline:
    """Freezes blocks of ``model`` while it trains.

    Args:
        model: any module; wrappers (DDP, ``torch.compile``) are looked through.
        optimizer: built with all parameters; frozen ones stay in their groups.
        policy: name of a policy (``frostline.policies.available()``).
        cache: ``auto`` (where it pays), ``memory`` or ``disk`` keeps boundary activations and skips the frozen prefix;
            ``off``. A mapping sets budgets and more (:class:`~frostline.cache.CacheOptions`).
        memory: level at which the tensors that autograd saves are compressed (``safe``, ``slimfit``, ``published``,
            ``max``); ``off``. Also with policy ``none``.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs in the run (may be fractional).
        batch_size: samples per optimizer step over all ranks and micro-batches. With the default of 1, "samples"
            in the log count optimizer steps.
        samples_per_epoch: where the last batch of an epoch is smaller.
        sized: whether ``steps_per_epoch`` is an epoch; else (a stream) any sample may come by again at any time.
        blocks: dotted path of the list of blocks, where it is not found by itself.
        events: an :class:`EventLog` or the path of one; kept in memory if not given.
        scaler: the gradient scaler, if there is one (``before_step`` must come before ``unscale_``).
        max_depth_changes: bound on moves of the frost line. Default: none, but 6 for a compiled model.
        options: the policy's own options.

    Raises:
        ConfigError: an unknown policy or option, a value out of range.
        ModelError: a model that cannot be frozen by depth, or is wrapped in a way that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        policy: str = "gradient-norm",
        cache: CacheSetting = "off",
        memory: MemorySetting = "off",
        steps_per_epoch: int,
        epochs: float,
        batch_size: int = 1,
        samples_per_epoch: int | None = None,
        sized: bool = True,
        blocks: str | None = None,
        events: EventLog | str | Path | None = None,
        scaler: Any = None,
        max_depth_changes: int | None = None,
        **options: Any,
    ) -> None:
        caching, saving = cache_options(cache), memory_options(memory)
        if saving.budget is not None:
            raise ConfigError(NO_BUDGET)
        level = saving.level
        if level != "off":
            refuse_compiled(model)
        checked = validate(policy, options)
        self.clock = Clock(steps_per_epoch, epochs, batch_size, samples_per_epoch, sized=sized)
        self.log = events if isinstance(events, EventLog) else EventLog(events)
        self.journal = Journal(self.log, self.clock)
        self.policy_name, self.policy_options = policy, checked.model_dump()
        self.scaler = scaler
        self.evaluations = self._final_depth = self._changes = 0
        self._learning_rate: float | None = None
        # A gradient is the mean over a batch: where batches grow, an interval's sum counts it as many times more.
        self._first_batch, self._weight = batch_size, 1.0
        self.seconds = {"statistics": 0.0, "decide": 0.0}
        self._blocks_path = blocks
        self._model_class = type(model).__name__
        self._active = policy != "none"
        split = is_split(model)
        if split and level != "off":
            raise ModelError(NOT_COMPRESSED_SPLIT)
        self._statistics: Measurements | None = None
        self._parting: dict[str, Any] = {}
        self.cache: CacheManager | None = None
        self._cached: dict[str, Any] | None = None
        self._compressor: Compressor | None = None
        if not self._active:
            if level != "off":
                self._compressor = Compressor(model, level, entries=_entries(model, blocks))
            return
        compiled = is_compiled(model)
        self._max_changes = COMPILED_DEPTH_CHANGES if max_depth_changes is None and compiled else max_depth_changes
        self.stack = BlockStack.find(model, blocks)
        self._model_class = type(self.stack.model).__name__
        self.plan = plan_for(self.stack, batch_size, self.clock.samples_per_epoch, epochs)
        self.policy = create(policy, options, self.plan)
        self._cadence = self.policy.cadence()
        restless = self._cadence is not None and self._cadence.restless
        if restless and has_compiled(model):
            raise ModelError(
                f"policy {policy!r} changes what trains at every step, and a compiled model, or block, would be "
                "compiled anew each time: train it without torch.compile"
            )
        upkeep = Upkeep.find(model, restless=restless)
        self._agreement: Agreement | None = None
        if upkeep is not None:
            self._agreement = Agreement(upkeep.process_group, upkeep.device, len(self.stack), self.plan.layer_paths)
        self.freezer = Freezer(self.stack, optimizer, self.policy.moments, upkeep)
        self.journal.begin(self._policy_numbers(), self._model_class, self.stack.path, self.plan)
        if compiled and self.stack.noisy_parents:
            self.stack.noisy_parents = False
            self.limit(
                "compiled-noise",
                "compiled model: code outside the blocks (SpecAugment, LayerDrop, shared "
                "dropout) stays random below the frost line",
            )
        for message in self.stack.limits:
            self.limit("model", message)
        if upkeep is not None and upkeep.limit is not None:
            self.limit("traffic", upkeep.limit)
        self._measure()
        self.cache = self._make_cache(caching, model if compiled else None)
        self._first_forward: torch.utils.hooks.RemovableHandle | None = None
        if not self.stack.traced and (split or (compiled and not hasattr(model, "_orig_mod"))):
            how = "split over ranks" if split else "compiled in place"
            self.limit("order", f"{how}, a model hides its inputs: registration order tells its stem")
        elif not self.stack.traced:
            # On the wrapper of torch.compile, where there is one: inside of it the look itself would be compiled.
            watched = model if compiled else self.stack.model
            self._first_forward = watched.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        self._apply(self.policy.start())
        self._compressor = Compressor(model, level, entries=self.stack.ancestors()) if level != "off" else None

    # -- what adapters and users call ---------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.clock.step

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        return self.clock.samples

    @property
    def depth(self) -> int:
        """Number of leading blocks frozen now."""
        return self.freezer.depth if self._active else 0

    def before_step(self, *, unscaled: bool = False) -> None:
        """Read the accumulated gradient: call before clipping and before ``optimizer.step()``.

        ``unscaled``: the host has taken the loss scale out already (it may still skip a step that overflowed).
        """
        if self._statistics is None:
            return
        start = time.perf_counter()
        self._learning_rate = learning_rate(self.freezer.optimizer)
        scaled = self.scaler is not None and self.scaler.is_enabled()
        loss_scale = self.scaler.get_scale() if scaled and not unscaled else 1.0
        self._statistics.before_step(self._weight / loss_scale, check=scaled)
        self.seconds["statistics"] += time.perf_counter() - start

    def after_step(self) -> None:
        """Count the step and, where an interval ends, decide: call after ``optimizer.step()``."""
        self.clock.step += 1
        if self._compressor is not None and not self._compressor.kept:
            self.limit("memory", NOT_COMPRESSED)
        if self._statistics is not None:
            start = time.perf_counter()
            if not self._statistics.after_step():
                self.limit("statistics", NOT_LOOKED)
            self.seconds["statistics"] += time.perf_counter() - start
        if self.cache is not None:
            self.cache.agree()
        if not self._active or self._cadence is None:
            return
        if self._cadence.times(step=self.step, samples=self.samples) > self.evaluations:
            start = time.perf_counter()
            self._decide()
            self.seconds["decide"] += time.perf_counter() - start

    def loader(self, loader: Any) -> Any:
        """Go through ``loader`` one batch ahead of the loop, so that the cache reads from disk before it has to.

        Batches are fetched in the same order and handed out unchanged. They must be mappings of the model's inputs
        (``model(**batch)``). Accelerate's loaders are given back themselves, since they look ahead already.
        """
        return watched(loader, self._expect) if self.cache is not None else loader

    def limit(self, code: str, message: str) -> None:
        """Log what cannot be done for this model, once (law 8)."""
        self.journal.limit(code, message)

    def finish(self) -> None:
        """Thaw the model and take away everything that was installed."""
        if self._compressor is not None:
            self._compressor.detach()
        if self._active:
            self._final_depth = self.depth
            self._parting = {**self._freezing_state(), "interval_steps": 0}
            if self._first_forward is not None:
                self._first_forward.remove()
            if self.cache is not None:
                self._cached = self.cache.summary()
                self.cache.close()
                self.cache = None
            self.freezer.release()
            self._active, self._statistics = False, None

    def summary(self) -> Summary:
        """What happened so far; ``print`` it, or read it as a dictionary."""
        stack = getattr(self, "stack", None)
        return Summary(
            policy=self._policy_numbers(),
            model=self._model_class,
            stack=stack.path if stack else None,
            blocks=len(stack) if stack else 0,
            final_depth=self.depth if self._active else self._final_depth,
            trajectory=list(self.journal.trajectory),
            decisions=self.evaluations,
            steps=self.step,
            samples=self.samples,
            seconds=dict(self.seconds),
            cache=self.cache.summary() if self.cache is not None else self._cached,
            memory={"level": kept.level.name, "kept": kept.kept} if (kept := self._compressor) is not None else None,
            limits=list(self.journal.limits),
        )

    # -- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything resume needs: JSON values under ``state``, tensors under ``tensors``."""
        state: dict[str, Any] = {
            "policy": self.policy_name,
            "options": self.policy_options,
            "step": self.step,
            "samples": self.samples,
            "batch": self._first_batch,
            "evaluations": self.evaluations,
            "changes": self._changes,
            "seconds": self.seconds,
            **self.journal.state(),
            "cache": self.cache.state_dict() if self.cache is not None else None,
            "kept": self._compressor.kept if self._compressor is not None else None,
        }
        # After finish() the sums are gone: who continues from there starts a new interval.
        state.update(self._freezing_state() if self._active else self._parting)
        return {"state": state, "tensors": self._statistics.tensors() if self._statistics is not None else {}}

    def _freezing_state(self) -> dict[str, Any]:
        decision, statistics = self.freezer.decision, self._statistics
        return {
            "model": fingerprint(self.stack.model, len(self.stack)),
            "decision": {"depth": decision.depth, "resting": sorted(decision.resting)},
            "policy_state": self.policy.state_dict(),
            "interval_steps": statistics.steps if statistics is not None else 0,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`: the frozen set is applied at once.

        Raises:
            ResumeError: the state belongs to another model or another policy.
        """
        state, tensors = saved["state"], saved["tensors"]
        if (state["policy"], state["options"]) != (self.policy_name, self.policy_options):
            raise ResumeError(
                f"the checkpoint was made with policy {state['policy']} {state['options']}, this run has "
                f"{self.policy_name} {self.policy_options}: resume with the same, or start anew"
            )
        if self._active and state["model"] != (here := fingerprint(self.stack.model, len(self.stack))):
            raise ResumeError(f"the checkpoint belongs to another model: {state['model']}, this one is {here}")
        self.clock.resume(state["step"], state["samples"])
        self._first_batch = state.get("batch", self._first_batch)
        self._weight = self.clock.batch_size / self._first_batch
        self.evaluations = state["evaluations"]
        self._changes, self.seconds = state["changes"], dict(state["seconds"])
        self.journal.load(state)
        if self._compressor is not None:
            self._compressor.kept = max(self._compressor.kept, state.get("kept") or 0)
        if self.cache is not None and state.get("cache"):
            self.cache.load_state_dict(state["cache"])
        if self._active:
            self.policy.load_state_dict(state["policy_state"])
            depth, resting = state["decision"]["depth"], state["decision"]["resting"]
            self._freeze(Decision(depth, frozenset(resting)))
            if self._statistics is not None:
                self._statistics.load(tensors, state["interval_steps"], range(depth, len(self.stack)))

    def save(self, directory: str | Path, **extra: Any) -> None:
        """Write the state into a checkpoint directory (JSON + safetensors); ``extra`` JSON values go along."""
        saved = self.state_dict()
        save_state(directory, {**saved["state"], **extra}, saved["tensors"])

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Continue from :meth:`save`; returns the JSON values.

        Raises:
            ResumeError: nothing there, torn, or of another model or policy.
        """
        state, tensors = load_state(directory)
        self.load_state_dict({"state": state, "tensors": tensors})
        self.journal.write("resume", path=str(directory))
        return state

    # -- inside -------------------------------------------------------------------------------------

    def _expect(self, batch: Any) -> None:
        if self.cache is not None:
            self.cache.expect(batch)

    def _decide(self) -> None:
        self.evaluations += 1
        upkeep = self.freezer.upkeep
        if upkeep is not None and upkeep.held:
            self.limit("uneven-inputs", UNEVEN)
            return
        observed = self._statistics.observed() if self._statistics is not None else {}
        if observed and upkeep is not None and self._agreement is not None and not upkeep.joining:
            observed = self._agreement.on(observed, self.step)
        seen = Observation(
            step=self.step,
            samples=self.samples,
            progress=self.samples / self.plan.total_samples,
            depth=self.depth,
            blocks=len(self.stack),
            learning_rate=self._learning_rate,
            **observed,
        )
        decision, why = self.policy.decide(seen)
        self._apply(decision, seen, why)

    def _apply(self, decision: Decision, seen: Observation | None = None, why: Explained | None = None) -> None:
        before, applied = self.depth, True
        if decision.depth != before:
            if self._max_changes is not None and self._changes >= self._max_changes:
                applied = False
                self.limit(
                    "depth-changes",
                    f"the frost line has moved {self._changes} times, the most that "
                    "max_depth_changes allows (each move recompiles the model once): it stays where it is",
                )
                decision = self.freezer.decision  # what is to rest was chosen for the other line
            else:
                self._changes += 1
        self._freeze(decision)
        if decision.depth != before:
            self.journal.moved(decision.depth)
        if self._statistics is not None:
            self._statistics.reset(range(decision.depth, len(self.stack)))
        moved = decision.depth != before or not applied
        if seen is not None and why is not None and (moved or self.evaluations % self.policy.log_every == 0):
            self.journal.decided(self.evaluations, seen, why, before, decision, applied=applied)

    def _freeze(self, decision: Decision) -> None:
        self.freezer.apply(decision)
        if self.cache is not None:
            self.cache.moved(self.stack, decision.depth)

    def _make_cache(self, options: CacheOptions, compiled: nn.Module | None) -> CacheManager | None:
        if options.mode == "off":
            return None
        if is_split(self.stack.model):
            self.limit("cache-split", NOT_CACHED_SPLIT)
            return None
        if compiled is not None and getattr(compiled, "_orig_mod", None) is not self.stack.model:
            self.limit("cache-compiled", NOT_CACHED_COMPILED)
            return None
        return CacheManager(
            self.stack, options, self.clock, report=self.journal.cache, limit=self.limit, compiled=compiled
        )  # fmt: skip

    def _measure(self) -> None:
        """Prepare the statistics that the policy needs."""
        if self.policy.needs:
            blocks = {
                i: {n: p for n, p in self.stack.parameters_of(i).items() if p.requires_grad}
                for i in range(len(self.stack))
            }
            layers = {path: self.stack.model.get_parameter(path) for path in self.plan.layer_paths}
            self._statistics = Measurements(self.policy.needs, blocks, layers)

    def _see_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """First training batch of a model whose inputs could not be made up: look again, now with real ones."""
        if not model.training or not torch.is_grad_enabled() or self._first_forward is None:
            return
        self._first_forward.remove()
        decision, optimizer, upkeep = self.freezer.decision, self.freezer.optimizer, self.freezer.upkeep
        self.freezer.release()
        self.stack = BlockStack.find(model, self._blocks_path, (args, kwargs))
        self.plan = plan_for(self.stack, self.plan.samples_per_step, self.plan.samples_per_epoch, self.plan.epochs)
        decision = self.policy.replan(self.plan, decision)
        self.freezer = Freezer(self.stack, optimizer, self.policy.moments, upkeep)
        before = self._statistics
        self._measure()
        self._freeze(decision)
        if self._statistics is not None:
            active = range(decision.depth, len(self.stack))
            self._statistics.reset(active)
            if before is not None and before.steps:  # resumed in the middle of an interval
                self._statistics.load(before.tensors(), before.steps, active)
        for message in self.stack.limits:
            self.limit("model", message)

    def _policy_numbers(self) -> dict[str, Any]:
        return {"name": self.policy_name, "options": self.policy_options}


def _entries(model: nn.Module, blocks: str | None) -> list[nn.Module]:
    """Modules that a loop may call in place of ``model``; none where it has no stack of blocks."""
    try:
        return BlockStack.find(model, blocks).ancestors()
    except ModelError:
        return []
