"""Running a recipe end to end: data, model, training, test, saved model, and plain fine-tuning beside it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils import logging as hf_logging

from frostline.adapters.checkpoints import newest_complete
from frostline.adapters.huggingface import Frost, attach
from frostline.adapters.measuring import ignores_items
from frostline.adapters.recorder import Recorder, plain_metrics
from frostline.adapters.staging import ordered_loader
from frostline.errors import ConfigError, FrostlineError, ResumeError
from frostline.events import EventLog, environment, json_safe
from frostline.memory import MemoryOptions
from frostline.packing import Order, Stages
from frostline.recipes.directory import RunDirectory, write_recipe
from frostline.recipes.ranks import agreed, is_first, rank, ranks
from frostline.recipes.schema import FreezeSection, Recipe, Schedule
from frostline.recipes.staged import Launch, Staged, continued
from frostline.recipes.training import build_arguments
from frostline.tasks.classification import Prepared
from frostline.tasks.registry import TASKS

__all__ = ["RunInterrupted", "RunResult", "build_trainer", "prepare", "run", "run_stage"]

SUMMARY_VERSION = 1


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped the run; the message says what is left and how to go on."""


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and the content of its ``summary.json``; ``baseline`` is that of plain fine-tuning."""

    directory: Path
    summary: dict[str, Any]
    baseline: dict[str, Any] | None = None


def prepare(recipe: Recipe) -> Prepared:
    """The data of ``recipe``, made ready for its model. Raises as the task's own ``prepare`` does."""
    return TASKS[recipe.task].prepare(recipe.data, recipe.model, recipe.sample_size)


def run(recipe: Recipe, *, started: float | None = None) -> RunResult:
    """Run ``recipe`` and leave its directory as docs/architecture.md describes it.

    Args:
        recipe: from :func:`frostline.recipes.schema.load_recipe`.
        started: when the run began, in seconds since the epoch; the command line gives the start of the process, so
            that ``seconds.total`` counts imports. Default: now.

    Raises:
        FrostlineError: anything a user can act on. If training had not begun, nothing is left behind.
        RunInterrupted: Ctrl-C.
    """
    if ranks() > 1:
        raise ConfigError(f"{ranks()} processes: start a recipe on several ranks with frostline launch")
    if recipe.pack.mode != "none":
        raise ConfigError(f"pack.mode={recipe.pack.mode} changes the run's processes: start it with frostline launch")
    result = _run(recipe, time.time() if started is None else started)
    assert result is not None, "a run that was not launched has no stages"
    return result


def run_stage(recipe: Recipe, launch: Launch, *, started: float) -> RunResult | None:
    """Run the stage of ``recipe`` that this process, one of those of ``launch``, is to train.

    Returns:
        The finished run; ``None`` where another stage follows.

    Raises:
        As :func:`run` does.
    """
    ours = agreed(lambda: continued(recipe, launch))
    return _run(ours, started, launch) if ours is not None else None


def _run(recipe: Recipe, started: float, launch: Launch | None = None) -> RunResult | None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    directory = agreed(lambda: RunDirectory(recipe))
    try:
        with _one_progress_bar():
            if recipe.resume:
                agreed(lambda: _require_progress(recipe))
            data = prepare(recipe)
            agreed(lambda: directory.start(launch.name if launch is not None else None))
            setup = time.time() - started
            staged = Staged(recipe, launch, len(data.train), started) if launch is not None else None
            summary = _side(recipe, data, setup, directory.commit if is_first() else None, staged)
            if summary is None:
                return None
            baseline = _baseline(recipe, data, setup) if recipe.baseline == "full" else None
        return RunResult(directory.path, summary, baseline)
    except KeyboardInterrupt:
        raise RunInterrupted(_farewell(recipe, is_first() and directory.abandon())) from None
    except BaseException:
        if is_first():
            directory.abandon()
        raise


def _baseline(recipe: Recipe, data: Prepared, setup: float) -> dict[str, Any]:
    """Plain fine-tuning with the same settings and seed, in ``baseline`` inside the run."""
    folder = recipe.directory / "baseline"
    plain = recipe.model_copy(
        update={
            "name": "baseline",
            "freeze": FreezeSection(policy="none"),
            "memory": MemoryOptions(),
            "baseline": "none",
            "output_dir": str(folder),
        }
    )
    if not (folder / "summary.json").is_file() and newest_complete(folder / "checkpoints", ours=False) is None:
        # A baseline that was killed before its first checkpoint starts again.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_recipe(plain, folder)
    summary = _side(plain, data, setup)
    assert summary is not None, "plain fine-tuning has no stages"
    return summary


def _side(
    recipe: Recipe,
    data: Prepared,
    setup: float,
    on_first_step: Callable[[], None] | None = None,
    staged: Staged | None = None,
) -> dict[str, Any] | None:
    """One side of a run, from the untrained model to ``summary.json``. A side that is finished is not repeated.

    ``None``: a stage of a launched run has ended, and another one follows.
    """
    folder, freeze = recipe.directory, recipe.freeze
    plain, finished = freeze.policy == "none", folder / "summary.json"
    checkpoints = staged.checkpoints if staged is not None else folder / "checkpoints"
    resume_from: Path | None = None
    if recipe.resume:
        # One rank looks: a file system of several hosts may not show all of them the same yet.
        if agreed(finished.is_file):
            return agreed(lambda: dict(json.loads(finished.read_text(encoding="utf-8"))))
        resume_from = agreed(lambda: newest_complete(checkpoints, ours=not plain))
        if staged is not None and staged.has_ended(resume_from):
            return None
    recorder = Recorder(
        EventLog(folder / "events.jsonl" if is_first() else None), title=recipe.name, plain=plain, earlier=setup,
        on_first_step=on_first_step, epoch=staged.order.samples if staged is not None else None, shown=is_first(),
    )  # fmt: skip
    trainer = build_trainer(recipe, data, checkpoints, staged)
    trainer.add_callback(recorder)
    frost = attach(
        trainer,
        freeze.policy,
        recipe.cache,
        memory=recipe.memory,
        blocks=freeze.blocks,
        events=recorder.log,
        max_depth_changes=freeze.max_depth_changes,
        **freeze.options,
    )
    recorder.watch(frost)
    if staged is not None:
        staged.watch(trainer, frost)
    with _readable_failures(folder, checkpoints):
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        finally:
            recorder.close()
        if staged is not None and staged.ends():
            frost.detach()
            return None
        _evaluate_at_the_end(trainer, recorder)
        test = _test(trainer, data)
        if is_first():
            _save_model(trainer, data, folder / "model")
        recorder.saved()
        summary = _summary(recipe, frost, recorder, test)
        if is_first():
            _write_json(finished, summary)
        frost.detach()
    return summary


class _RecipeTrainer(Trainer):
    """A Trainer whose learning rate follows a recipe's ``schedule``, and whose samples an ``order``, where given."""

    def __init__(self, *args: Any, schedule: Schedule | None, order: Order | None, **kwargs: Any) -> None:
        self._schedule, self._order = schedule, order
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return super().get_train_dataloader() if self._order is None else ordered_loader(self, self._order)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        sampler = dataloader.batch_sampler
        return sampler.samples if isinstance(sampler, Order) else super().num_examples(dataloader)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        schedule = self._schedule
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None, "the Trainer builds its optimizer before its scheduler"
            self.lr_scheduler = LambdaLR(optimizer, lambda step: schedule.at_step(step, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def build_trainer(recipe: Recipe, data: Prepared, checkpoints: Path, staged: Staged | None = None) -> Trainer:
    """The Trainer of a run, or of a stage of it, with the untrained model in it.

    Its checkpoints go to ``checkpoints``.
    """
    set_seed(recipe.seed)
    settings = staged.settings() if staged is not None else recipe.training
    trainer = _RecipeTrainer(
        model=TASKS[recipe.task].build_model(data, recipe.model, recipe.seed),
        args=build_arguments(settings, checkpoints, seed=recipe.seed),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=data.processor,
        compute_metrics=data.compute_metrics,
        schedule=recipe.schedule,
        order=staged.order if staged is not None else None,
    )
    # It prints every log as a dictionary over our progress bar.
    trainer.remove_callback(PrinterCallback)
    if staged is not None:
        if agreed(lambda: ignores_items(trainer)):
            # The Trainer would take its mean loss for a sum, and multiply it by the number of ranks.
            trainer.model_accepts_loss_kwargs = False
        set_seed(recipe.seed + rank())  # or the ranks would draw the same masks
    return trainer


def _evaluate_at_the_end(trainer: Trainer, recorder: Recorder) -> None:
    """Validation metrics of the model that is saved, unless the last evaluation was of just that model."""
    if recorder.metrics_step != recorder.steps or trainer.args.load_best_model_at_end:
        trainer.evaluate()


def _test(trainer: Trainer, data: Prepared) -> dict[str, float]:
    """Metrics on the test split, empty where there is none."""
    if data.test is None:
        return {}
    return plain_metrics(trainer.predict(data.test).metrics or {}, "test")


def _save_model(trainer: Trainer, data: Prepared, target: Path) -> None:
    """An ordinary Hugging Face folder, replaced whole. The Trainer's own ``save_model`` would add a pickle."""
    temporary = target.with_name("model.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary)
    data.processor.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def _summary(recipe: Recipe, frost: Frost, recorder: Recorder, test: dict[str, float]) -> dict[str, Any]:
    summary = dict(frost.summary())
    trajectory = summary["trajectory"]
    if not trajectory or trajectory[0]["step"] > 0:
        trajectory = [{"step": 0, "samples": 0, "depth": 0}, *trajectory]
    return {
        "version": SUMMARY_VERSION,
        **summary,
        "trajectory": trajectory,
        "steps": recorder.steps,
        "samples": recorder.samples,
        "seconds": recorder.finish(),
        "metrics": recorder.metrics,
        "test": test,
        "seed": recipe.seed,
        "environment": environment(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(json_safe(content), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _require_progress(recipe: Recipe) -> None:
    folder = recipe.directory
    if (folder / "summary.json").is_file():
        return
    checkpoints, stages = folder / "checkpoints", Stages.read(folder)
    if stages is not None:
        checkpoints = stages.current.checkpoints(checkpoints)
    if newest_complete(checkpoints, ours=recipe.freeze.policy != "none") is None:
        raise ResumeError(
            f"nothing to resume: no complete checkpoint in {str(checkpoints)!r}; start again with overwrite=true"
        )


def _farewell(recipe: Recipe, undone: bool) -> str:
    if undone:
        return "stopped before the first training step: nothing was kept"
    folder = recipe.directory
    try:
        _require_progress(recipe)
    except ResumeError:
        return f"stopped; {str(folder)!r} has no checkpoint yet: start again with overwrite=true"
    return f"stopped; the same command with resume=true continues from the last checkpoint in {str(folder)!r}"


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """No bars of transformers (one for each file of weights it writes) beside the run's own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _readable_failures(folder: Path, checkpoints: Path) -> Iterator[None]:
    """Failing to write ends in one line, and takes a half-written checkpoint and model away."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its zip writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(folder / "model.tmp", ignore_errors=True)
        whole = newest_complete(checkpoints, ours=False)
        for checkpoint in checkpoints.glob("checkpoint-*"):
            if not (checkpoint / "trainer_state.json").is_file() and checkpoint != whole:
                shutil.rmtree(checkpoint, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        kept = f"; {whole.name} is kept: make room and continue with resume=true" if whole else ""
        raise FrostlineError(f"cannot write the run in {str(folder)!r}: {reason}{kept}") from error
