"""What a recipe's run would take: its own policy and plain fine-tuning, with and without a cache, on any ranks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ByteSize
from torch import nn
from transformers import Trainer

from frostline.adapters.measuring import bench_of, cost_of_optimizer, way_of
from frostline.blocks import BlockStack
from frostline.briefing import plan_for
from frostline.clock import Clock
from frostline.distributed import Buckets
from frostline.errors import ConfigError
from frostline.memory import MemoryModel, Way
from frostline.planning.courses import foresee
from frostline.planning.steps import Measured, measure_steps
from frostline.policies.base import Plan
from frostline.policies.registry import create
from frostline.recipes.runner import build_trainer, prepare
from frostline.recipes.schema import Recipe
from frostline.simulator import PACKINGS, Cluster, Course, Link, Profile, Simulation, Trajectory, simulate

__all__ = ["ALONE", "Forecast", "Prediction", "forecast"]

ALONE = Cluster(device_memory=ByteSize(2**62), between=Link(bytes_per_second=math.inf))
"""One rank, which sends nothing; that its memory is enough the measured steps have shown."""


@dataclass(frozen=True)
class Prediction:
    """One way to run the recipe.

    Attributes:
        policy: ``none``, or the recipe's own, and which of its courses.
        cache: whether boundary activations are kept; reading them is taken to be free.
        simulation: time, steps and cost of its training steps.
        peak: the most bytes alive on a rank at any moment of a step.
    """

    policy: str
    cache: bool
    simulation: Simulation
    peak: int

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        rank_hours = self.simulation.rank_hours
        found = {"policy": self.policy, "cache": self.cache, "peak_bytes": self.peak, "rank_hours": rank_hours}
        return {**found, **self.simulation.numbers()}


@dataclass(frozen=True)
class Forecast:
    """What :func:`forecast` found.

    Attributes:
        recipe: as it was planned.
        ranks: at the start.
        batch: samples of a rank in a step; ``measured.rows`` of them make a micro-batch.
        samples_per_epoch, epochs: length of the run.
        measured: steps of this machine.
        profile: of the model, made of them.
        predictions: plain fine-tuning first.
        notes: what the figures rest on, in words.
    """

    recipe: Recipe
    ranks: int
    batch: int
    samples_per_epoch: int
    epochs: float
    measured: Measured
    profile: Profile
    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...]

    def numbers(self) -> dict[str, Any]:
        """JSON values, of which ``frostline simulate`` reads the profile."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "ranks": self.ranks,
            "batch": self.batch,
            "samples_per_epoch": self.samples_per_epoch,
            "epochs": self.epochs,
            "measured": self.measured.numbers(),
            "profile": self.profile.model_dump(mode="json"),
            "predictions": [prediction.numbers() for prediction in self.predictions],
            "notes": list(self.notes),
        }


def forecast(
    recipe: Recipe, *, ranks: int = 1, cluster: Cluster = ALONE, trajectory: Trajectory | None = None
) -> Forecast:
    """Measure a few steps of the recipe's model on its data, and predict its run.

    Nothing is written; progress goes to stderr.

    Args:
        recipe: from :func:`frostline.recipes.schema.load_recipe`.
        ranks: processes of the run, each with the recipe's batch.
        cluster: what joins them, and what they cost.
        trajectory: of the recipe's policy, where it is known (a run's); default: what the policy says of itself.

    Raises:
        FrostlineError: as a run of the recipe does; ranks that need a cluster; a batch that does not fit into the
            cluster's devices; a compiled model.
    """
    if recipe.training.get("torch_compile"):
        raise ConfigError("training.torch_compile=true: steps of compiled models are not measured; plan without it")
    if trajectory is not None and recipe.freeze.policy == "none":
        raise ConfigError("freeze.policy=none freezes nothing: a trajectory is of another policy; set freeze.policy")
    if ranks < 1 or (ranks > 1 and cluster is ALONE):
        raise ConfigError(f"ranks={ranks}: must be at least 1, and several need a cluster that says what joins them")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, prepare(recipe), Path(folder))
        stack = BlockStack.find(cast(nn.Module, trainer.model), recipe.freeze.blocks)
        # Before anything is measured: settings that the model does not allow are said at once.
        clock = _length(trainer, ranks)
        plan = plan_for(stack, clock.batch_size, clock.samples_per_epoch, clock.epochs)
        policy = create(recipe.freeze.policy, recipe.freeze.options, plan)
        courses = _courses(recipe, plan, clock, trajectory)
        bench, way = bench_of(trainer, stack), way_of(trainer, recipe.memory.level)
        buckets = Buckets.of(stack.model) if ranks > 1 else None
        memory = MemoryModel.measure(bench, [way], cost_of_optimizer(trainer, stack), buckets=buckets)
        measured = measure_steps(trainer, bench, way)
    micro = trainer.args.gradient_accumulation_steps
    profile = measured.profile(type(stack.model).__name__, memory, way, accumulates=micro, ranks=ranks)
    peaks = _Peaks(memory, way, stack, micro)
    batch = micro * trainer.args.per_device_train_batch_size

    def predict(name: str, course: Course, packing: str, *, cache: bool = False) -> Prediction:
        found = simulate(profile, cluster, course, ranks=ranks, batch=batch, packing=packing, cache=cache)
        return Prediction(name, cache, found, peaks.of(found, sums=name in courses and "gradient_sum" in policy.needs))

    plain = predict("none", Course((), clock.samples_per_epoch, clock.epochs), "none")
    frozen = [
        predict(name, course, packing, cache=cache)
        for name, course in courses.items()
        for cache in (False, True)
        for packing in (PACKINGS if ranks > 1 else ("none",))
    ]
    notes = _notes(recipe, courses, rests=bool(policy.start().resting))
    return Forecast(
        recipe, ranks, batch, clock.samples_per_epoch, clock.epochs, measured, profile, (plain, *frozen), notes
    )


def _length(trainer: Trainer, ranks: int) -> Clock:
    """The steps of a run on ``ranks`` ranks, as the Trainer counts them."""
    args, loader = trainer.args, trainer.get_train_dataloader()
    batches = math.ceil(len(loader) / ranks)  # of a rank; those that have fewer get rows twice
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    return Clock(per_epoch, steps / per_epoch, batch, trainer.num_examples(loader))


def _courses(recipe: Recipe, plan: Plan, clock: Clock, trajectory: Trajectory | None) -> dict[str, Course]:
    freeze = recipe.freeze
    if freeze.policy == "none":
        return {}
    if trajectory is not None:
        return {freeze.policy: trajectory.course(clock.samples_per_epoch, clock.epochs)}
    return foresee(freeze.policy, freeze.options, plan, clock, max_depth_changes=freeze.max_depth_changes)


@dataclass(frozen=True)
class _Peaks:
    """What a step takes of memory in each stage of a run."""

    memory: MemoryModel
    way: Way
    stack: BlockStack
    micro: int

    def of(self, found: Simulation, *, sums: bool) -> int:
        """The most of all stages; ``sums``: the policy keeps a sum of gradients."""
        return max(
            self._at(stage.depth, math.ceil(stage.batch / self.micro)) + (self._sums(stage.depth) if sums else 0)
            for stage in found.stages
        )

    def _at(self, depth: int, rows: int) -> int:
        return self.memory.peak(self.way, rows, depth, accumulates=self.micro > 1)

    def _sums(self, depth: int) -> int:
        """In fp32, of the blocks that train."""
        above = (self.stack.parameters_of(block) for block in range(depth, len(self.stack)))
        return sum(4 * parameter.numel() for block in above for parameter in block.values())


def _notes(recipe: Recipe, courses: Mapping[str, Course], *, rests: bool) -> tuple[str, ...]:
    notes = [
        "time is that of the training steps, measured on this machine: start-up, evaluations, checkpoints and what a "
        "policy measures come on top"
    ]
    if courses:
        notes.append("with a cache, reading and writing records counts as free; their bytes are not in the peak")
    policy = recipe.freeze.policy
    lines = {name.rpartition(", ")[2]: _line(course) for name, course in courses.items()}
    if len(courses) > 1:
        said = "; ".join(f"{name} {line}" for name, line in lines.items())
        notes.append(
            f"{policy} decides on gradients that only training shows: its run lies between the courses that its "
            f"settings allow (sample: depth; {said}); --trajectory RUN takes a run's own"
        )
    else:
        notes += [f"{name} (sample: depth): {line}" for name, line in lines.items()]
    late = sum(len(course.late) for course in courses.values())
    if late:
        notes.append(f"the trajectory is of a longer run: its later moves are left out ({late})")
    if rests:
        notes.append("layers at rest count as if they trained: time and peak are those of none at rest")
    if recipe.memory.budget is not None:
        notes.append("memory.budget is not planned for: the figures are of the run as it is without one")
    return tuple(notes)


def _line(course: Course) -> str:
    return ", ".join(f"{move.samples:,}: {move.depth}" for move in course.moves) or "0: 0"
