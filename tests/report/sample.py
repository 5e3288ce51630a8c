"""Run directories as the engine and the runner leave them, for the tests of the report.

A simulated gradient of 6 blocks is put through the real policy, decision by decision, and every event goes
through the real :class:`EventLog`; only the training itself is made up.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from frostline.events import EventLog
from frostline.policies.base import Observation, Plan
from frostline.policies.registry import create

BLOCKS, EPOCHS, BATCH, STEPS_PER_EPOCH = 6, 4, 16, 100
SAMPLES_PER_EPOCH = BATCH * STEPS_PER_EPOCH
PLAN = Plan(
    block_paths=tuple(f"bert.encoder.layer.{i}" for i in range(BLOCKS)),
    stem_paths=("bert.embeddings",),
    head_paths=("bert.pooler", "classifier"),
    samples_per_step=BATCH,
    samples_per_epoch=SAMPLES_PER_EPOCH,
    epochs=EPOCHS,
)
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux-6",
    "processor": "Test CPU",
    "cores": 2,
    "threads": 1,
    "packages": {"frostline": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
}
RECIPE: dict[str, Any] = {
    "name": "sample",
    "task": "text-classification",
    "model": "minilm",
    "data": {"source": "trec", "text_column": "text"},
    "max_length": 128,
    "freeze": {"policy": "gradient-norm", "percentile": 50.0},
    "training": {"num_train_epochs": 4, "learning_rate": 5e-5},
    "seed": 3,
    "output_dir": "runs/sample",
}
LIMIT = "embeddings are tied to the head: they stay active"


def gradient(block: int, evaluation: int) -> float:
    """Norm of a block's summed gradient: the nearer the input, the sooner it settles; with a little ripple."""
    return 1.0 + 9.0 * math.exp(-evaluation * (1.3 - 0.2 * block)) + 0.02 * math.sin(7.0 * block + 3.0 * evaluation)


def write_run(
    path: Path,
    policy: str = "gradient-norm",
    *,
    options: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = RECIPE,
    seed: int = 3,
    accuracy: float = 0.94,
    environment: dict[str, Any] = ENVIRONMENT,
    model: str = "BertForSequenceClassification",
    killed_after: int | None = None,
    baseline: bool = False,
) -> Path:
    """Write one run directory; ``killed_after`` steps it stops without a summary and with a torn last line."""
    log = EventLog(path / "events.jsonl")
    options = {"percentile": 50.0, "evaluations_per_epoch": 5} if options is None else options
    options = {} if policy == "none" else options
    chosen = create(policy, options, PLAN)
    none = policy == "none"
    cadence = chosen.cadence()
    header = {"policy": {"name": policy, "options": options}, "model": model, "environment": environment}
    known = {"stack": None, "blocks": 0, "plan": None}
    if not none:
        known = {"stack": "bert.encoder.layer", "blocks": BLOCKS, "plan": PLAN.numbers()}
    log.append("run", step=0, samples=0, **header, **known)
    if not none:
        log.append("limit", step=0, samples=0, code="model", message=LIMIT)
    depth = chosen.start().depth
    trajectory = [{"step": 0, "samples": 0, "depth": depth}] if depth else []
    evaluations, last = 0, 0
    total = dict.fromkeys(("train", "statistics", "decide", "evaluate", "save", "other"), 0.0)
    for step in range(1, killed_after + 1 if killed_after else EPOCHS * STEPS_PER_EPOCH + 1):
        samples = step * BATCH
        if step % 10 == 0:
            loss = 0.2 + 1.5 * math.exp(-step / 120)
            log.append("loss", step=step, samples=samples, loss=loss, learning_rate=5e-5, epoch=step / STEPS_PER_EPOCH)
        here = None if cadence is None else samples if cadence.unit == "samples" else step
        due = here is not None and cadence is not None and here + 1e-6 >= (evaluations + 1) * cadence.every
        if due or (cadence is None and step % 20 == 0):
            seconds = {
                "train": (step - last) * step_seconds(depth),
                "statistics": 0.0 if none else 0.02,
                "decide": 0.0 if none else 0.001,
                "evaluate": 1.5 if step % STEPS_PER_EPOCH == 0 else 0.0,
                "save": 0.25 if step % STEPS_PER_EPOCH == 0 else 0.0,
                "other": 0.05,
            }
            log.append(
                "interval", step=step, samples=samples, depth=depth, steps=step - last, seconds=seconds,
                step_seconds=step_seconds(depth), bound_seconds=None if last == 0 else 0.96 * step_seconds(depth),
            )  # fmt: skip
            total = {phase: total[phase] + seconds[phase] for phase in total}
            if due:
                evaluations += 1
                scores = None
                if "gradient_sum" in chosen.needs:
                    scores = {block: gradient(block, evaluations) * (step - last) for block in range(depth, BLOCKS)}
                seen = Observation(
                    step, samples, samples / PLAN.total_samples, depth, BLOCKS, scores, step - last if scores else 0
                )
                decision, why = chosen.decide(seen)
                log.append(
                    "decision", step=step, samples=samples, evaluation=evaluations, observation=seen.numbers(),
                    explanation=why.numbers(), depth_before=depth, depth=decision.depth,
                    resting=sorted(decision.resting), applied=True,
                )  # fmt: skip
                if decision.depth != depth:
                    trajectory.append({"step": step, "samples": samples, "depth": decision.depth})
                depth = decision.depth
            last = step
        if step % STEPS_PER_EPOCH == 0:
            epoch = step / STEPS_PER_EPOCH
            metrics = {"eval_loss": 0.9 / epoch, "eval_accuracy": accuracy - 0.2 / epoch + 0.05, "eval_runtime": 1.4}
            log.append("evaluation", step=step, samples=samples, metrics=metrics, epoch=epoch)
    if recipe is not None:
        (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed}), encoding="utf-8")
    if killed_after:
        with (path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"event": "loss", "step": 9')
    else:
        seconds = {**total, "total": sum(total.values()) + 6.0}
        seconds["other"] += 6.0
        log.append("end", step=step, samples=samples, seconds=seconds)
        summary = {
            "version": "0.1.0",
            **header,
            **{key: known[key] for key in ("stack", "blocks")},
            "final_depth": depth,
            "trajectory": trajectory,
            "decisions": evaluations,
            "steps": step,
            "samples": samples,
            "seconds": seconds,
            "metrics": metrics,
            "test": {"test_loss": 0.21, "test_accuracy": accuracy, "test_f1": accuracy - 0.01},
            "limits": [] if none else [LIMIT],
            "seed": seed,
        }
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if baseline:
        same = {"recipe": recipe, "seed": seed, "environment": environment, "model": model}
        write_run(path / "baseline", "none", accuracy=0.945, **same)
    return path


def step_seconds(depth: int) -> float:
    """The step without a cache: (3N - 2k) / 3N of the whole step."""
    return 0.1 * (3 * BLOCKS - 2 * depth) / (3 * BLOCKS)
