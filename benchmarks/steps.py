"""The measurements of :mod:`benchmarks.step_time`: each takes a model and a batch and returns JSON values.

Raw samples go into the result beside what is concluded from them. The learning rate is so small that the model
stays what it was; the arithmetic of a step does not depend on it.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.batches import Batch
from benchmarks.timing import now, paired_ratio, seconds_per_call, spread
from benchmarks.truncated import Prefix, Truncated
from frostline import BlockStack, Frostline, ModelError

__all__ = ["adamw", "measure_depths", "measure_none", "measure_statistics", "update"]

TARGET_RATIO = 1.10
TARGET_SHARE = 0.03
_LEARNING_RATE = 1e-7
# A sample lasts at least so long where that takes no more than ten steps.
_SAMPLE_SECONDS, _MOST_STEPS = 0.25, 10
_TOLERANCE = 1e-5


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)


def _backward(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch.inputs).loss
    loss.backward()
    return loss.detach()


def update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


# -- a step at each depth against its bound ---------------------------------------------------------------


class _Visit:
    """Everything that is timed at one depth. The copies share the weights, so they cost no memory."""

    def __init__(self, stack: BlockStack, depth: int, batch: Batch) -> None:
        self.depth, self.batch = depth, batch
        self.truncated = Truncated(stack, depth, batch.inputs)
        self.bound_optimizer = adamw(self.truncated.parameters)
        self.prefix = Prefix(stack, depth) if depth else None
        self.calls: dict[str, int] = {}
        self.samples: dict[str, list[float]] = {}
        self.differences: dict[str, float] = {}

    def jobs(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, frost: Frostline
    ) -> dict[str, Callable[[], Any]]:
        parameters = list(model.parameters())

        def frostline() -> None:
            _backward(model, self.batch)
            frost.before_step()
            update(parameters, optimizer)
            frost.after_step()

        def truncated() -> None:
            _backward(self.truncated.model, self.batch)
            update(self.truncated.parameters, self.bound_optimizer)

        jobs: dict[str, Callable[[], Any]] = {"frostline": frostline, "truncated": truncated}
        if self.prefix is not None:
            prefix = self.prefix
            jobs["prefix"] = lambda: prefix.run(self.batch.inputs)
        return jobs

    def check(self, model: nn.Module, seed: int) -> None:
        """The bound is one only if it is that of the same step: same loss and gradients under the same dropout."""
        found = []
        for network in (model, self.truncated.model):
            torch.manual_seed(seed)
            loss = float(_backward(network, self.batch))
            gradients = [p.grad for p in self.truncated.parameters if p.grad is not None]
            found.append((loss, gradients))
            model.zero_grad(set_to_none=True)
        (loss, gradients), (bound_loss, bound_gradients) = found
        if len(gradients) != len(bound_gradients):
            raise ModelError(f"depth {self.depth}: the truncated model trains other weights than Frostline does")
        largest = max(float(g.abs().max()) for g in gradients)
        apart = max(float((a - b).abs().max()) for a, b in zip(gradients, bound_gradients, strict=True))
        self.differences = {"loss": abs(loss - bound_loss) / abs(loss), "gradient": apart / largest}
        if not max(self.differences.values()) <= _TOLERANCE:
            raise ModelError(f"depth {self.depth}: the truncated model computes something else: {self.differences}")

    def numbers(self, seed: int) -> dict[str, Any]:
        samples = self.samples
        below = samples.get("prefix") or [0.0] * len(samples["truncated"])
        bound = [above + prefix for above, prefix in zip(samples["truncated"], below, strict=True)]
        ratio = paired_ratio(samples["frostline"], bound, seed)
        return {
            "depth": self.depth,
            "ratio": ratio,
            "target": TARGET_RATIO,
            "met": ratio["median"] <= TARGET_RATIO,
            "seconds": {**{name: spread(values) for name, values in samples.items()}, "bound": spread(bound)},
            "steps_per_sample": self.calls,
            "difference_from_bound": self.differences,
            "samples": samples,
        }


def measure_depths(model: nn.Module, batch: Batch, rounds: int, seed: int, device: str) -> dict[str, Any]:
    """Frostline's step at each depth, against truncated model plus prefix. Seconds per step.

    Raises:
        ModelError: no truncated model can be made of ``model``, or it does not compute what Frostline's step does.
    """
    stack = BlockStack.find(model)
    visits = [_Visit(stack, depth, batch) for depth in range(len(stack))]
    optimizer = adamw(model.parameters())
    model.train()
    torch.manual_seed(seed)
    _backward(model, batch)
    update(list(model.parameters()), optimizer)
    # Freezing drops moments; they are put back at each visit, so that no timed step has to make new ones.
    moments = dict(optimizer.state)
    for visit in visits:
        visit.bound_optimizer.state.update({p: moments[p] for p in visit.truncated.parameters})
    order = random.Random(seed)
    for number in tqdm(range(rounds + 1), desc=f"depths, {batch.rows} x {batch.length}", unit="round"):
        for visit in order.sample(visits, len(visits)):
            frost = Frostline(model, optimizer, policy="static", depth=visit.depth, steps_per_epoch=1000, epochs=1)
            optimizer.state.update({p: moments[p] for p in visit.truncated.parameters})
            if visit.prefix is not None:
                visit.truncated.feed(visit.prefix.run(batch.inputs))
            jobs = visit.jobs(model, optimizer, frost)
            if number == 0:
                visit.check(model, seed)
            for name in order.sample(list(jobs), len(jobs)):
                seconds = seconds_per_call(jobs[name], visit.calls.get(name, 1), device)
                if number == 0:  # not counted: it warms up, and says how many steps a sample should have
                    visit.calls[name] = max(1, min(_MOST_STEPS, math.ceil(_SAMPLE_SECONDS / seconds)))
                else:
                    visit.samples.setdefault(name, []).append(seconds)
            frost.finish()
    return {"batch": batch.numbers(), "rounds": rounds, "depths": [visit.numbers(seed) for visit in visits]}


# -- policy none ------------------------------------------------------------------------------------------


def measure_none(model: nn.Module, batch: Batch, pairs: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    """Loops of ``steps`` steps with and without policy none, ``pairs`` times each; seconds a loop.

    ``loop`` is a plain loop with the engine's calls in it, ``trainer`` a whole ``Trainer.train()`` with ``attach``.
    """
    optimizer = adamw(model.parameters())
    parameters = list(model.parameters())

    def plain() -> None:
        model.train()
        for _ in range(steps):
            _backward(model, batch)
            update(parameters, optimizer)

    def frostline() -> None:
        frost = Frostline(model, optimizer, policy="none", steps_per_epoch=steps, epochs=1)
        model.train()
        for _ in range(steps):
            _backward(model, batch)
            frost.before_step()
            update(parameters, optimizer)
            frost.after_step()
        frost.finish()

    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, dict[str, Callable[[], Callable[[], Any]]]] = {
            "loop": {"plain": lambda: plain, "frostline": lambda: frostline},
            "trainer": {
                "plain": lambda: _trainer(model, batch, steps, seed, device, folder, attached=False),
                "frostline": lambda: _trainer(model, batch, steps, seed, device, folder, attached=True),
            },
        }
        found = {name: _compare(name, loop, pairs, seed, device) for name, loop in loops.items()}
    return {"batch": batch.numbers(), "steps": steps, **found}


def _compare(
    name: str, variants: dict[str, Callable[[], Callable[[], Any]]], pairs: int, seed: int, device: str
) -> dict[str, Any]:
    """``variants`` make what is timed; the making is not."""
    samples: dict[str, list[float]] = {variant: [] for variant in variants}
    order = random.Random(seed)
    for number in tqdm(range(pairs + 1), desc=f"policy none, {name}", unit="pair"):
        for variant in order.sample(list(variants), len(variants)):
            seconds = seconds_per_call(variants[variant](), 1, device)
            if number:  # the first pair warms up
                samples[variant].append(seconds)
    ratio = paired_ratio(samples["frostline"], samples["plain"], seed)
    low, high = ratio["interval"]
    return {
        "ratio": ratio,
        "contains_one": low <= 1.0 <= high,
        "seconds": {variant: spread(values) for variant, values in samples.items()},
        "samples": samples,
    }


def _trainer(
    model: nn.Module, batch: Batch, steps: int, seed: int, device: str, folder: str, attached: bool
) -> Callable[[], Any]:
    import transformers

    import frostline

    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=batch.rows, learning_rate=_LEARNING_RATE,
        optim="adamw_torch_fused", seed=seed, use_cpu=not device.startswith("cuda"), report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{key: value[i].cpu() for key, value in batch.inputs.items()} for i in range(batch.rows)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)

    def train() -> None:
        if attached:
            frostline.attach(trainer, policy="none")
        trainer.train()

    return train


# -- gradient statistics ----------------------------------------------------------------------------------


def measure_statistics(model: nn.Module, batch: Batch, steps: int, seed: int, device: str) -> dict[str, Any]:
    """``before_step`` of policy gradient-norm at depth 0, as a share of the rest of its step. Seconds a step.

    ``bytes`` is the memory of the sums, ``evaluation_seconds`` what one decision costs at the end of an interval.
    """
    optimizer = adamw(model.parameters())
    parameters = list(model.parameters())
    model.train()
    torch.manual_seed(seed)
    warm_up = 2
    frost = Frostline(
        model, optimizer, policy="gradient-norm", evaluations_per_epoch=1, steps_per_epoch=warm_up + steps, epochs=1
    )
    samples: dict[str, list[float]] = {"before_step": [], "rest": []}
    for number in tqdm(range(warm_up + steps), desc=f"statistics, {batch.rows} x {batch.length}", unit="step"):
        start = now(device)
        _backward(model, batch)
        before = now(device)
        frost.before_step()
        after = now(device)
        update(parameters, optimizer)
        end = now(device)
        frost.after_step()
        if number >= warm_up:
            samples["before_step"].append(after - before)
            samples["rest"].append(end - start - (after - before))
    share = paired_ratio(samples["before_step"], samples["rest"], seed)
    sums = frost.state_dict()["tensors"].values()
    result = {
        "batch": batch.numbers(),
        "share": share,
        "target": TARGET_SHARE,
        "met": share["median"] <= TARGET_SHARE,
        "bytes": sum(value.numel() * value.element_size() for value in sums),
        "evaluation_seconds": frost.seconds["decide"],
        "seconds": {name: spread(values) for name, values in samples.items()},
        "samples": samples,
    }
    frost.finish()
    return result
