"""A recipe that was launched: which stage of it this process trains, and what follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from frostline.adapters.checkpoints import newest_complete
from frostline.adapters.huggingface import Frost
from frostline.adapters.measuring import peaks_of, row_seconds
from frostline.adapters.staging import Keeper, behind, move_on
from frostline.errors import ConfigError
from frostline.packing import STAGES, Job, Order, Stage, Stages
from frostline.recipes.directory import claimed_by
from frostline.recipes.ranks import agreed, is_first, rank, ranks, unseen
from frostline.recipes.schema import Recipe

__all__ = ["Launch", "Staged", "check", "continued"]


class Launch:
    """What ``frostline launch`` tells the processes that it starts.

    Attributes:
        name: of this launch, unlike any other.
        stage: number of the stage that it has started.
        per_host: ranks on a host in the first stage.
    """

    def __init__(self, name: str, stage: int, per_host: int) -> None:
        self.name, self.stage, self.per_host = name, stage, per_host


def continued(recipe: Recipe, launch: Launch) -> Recipe | None:
    """``recipe``, to be resumed if this launch has begun it already: in an earlier stage, or before a process died.

    ``None``: a process died when the stage was over, and the next one is at work.
    """
    stages = Stages.read(recipe.directory)
    if stages is None or stages.launch != launch.name:
        # A process died when the run had claimed its directory, and had no stages yet: it begins again.
        claimed = claimed_by(recipe.directory) == launch.name
        return recipe.model_copy(update={"overwrite": True}) if claimed and not recipe.resume else recipe
    if stages.current.number > launch.stage:
        return None
    if recipe.resume:
        return recipe
    begun = newest_complete(stages.current.checkpoints(recipe.directory / "checkpoints"), ours=_freezes(recipe))
    return recipe.model_copy(update={"resume": begun is not None, "overwrite": begun is None})


def check(recipe: Recipe) -> None:
    """Whether ``recipe`` can be launched.

    Raises:
        ConfigError: a setting that stages, or packing, cannot keep.
    """
    training, pack = recipe.training, recipe.pack
    if recipe.baseline != "none":
        raise ConfigError(
            f"baseline={recipe.baseline} is for frostline run: launch it by itself, with freeze.policy=none "
            "and an output_dir of its own, then compare both"
        )
    strategy = training.get("train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise ConfigError(
            f"training.train_sampling_strategy={strategy!r}: a launched run deals out its samples itself; choose "
            "random or sequential"
        )
    if training.get("auto_find_batch_size"):
        raise ConfigError("training.auto_find_batch_size changes batches that have been dealt out: drop it")
    if recipe.memory.budget is not None:
        raise ConfigError(
            "memory.budget does not go with a launched run, whose micro-batches have been dealt out: set memory.level, "
            "and a batch that fits (pack.memory says what a rank may take when stages change)"
        )
    if pack.mode == "none":
        return
    fractional = training["num_train_epochs"] % 1 > 0 and pack.mode == "performance"
    reasons = {
        "freeze.policy=none": (not _freezes(recipe), "nothing is frozen, so no memory is freed"),
        "training.max_steps": (training.get("max_steps", -1) > 0, "steps change; set training.num_train_epochs"),
        "training.load_best_model_at_end": (
            training.get("load_best_model_at_end", False),
            "the checkpoints of earlier stages are gone at the end",
        ),
        "training.save_strategy=best": (training["save_strategy"] == "best", "a stage ends with a checkpoint"),
        "training.save_only_model": (
            training.get("save_only_model", False),
            "a stage goes on with the moments of the one before",
        ),
        "training.ignore_data_skip": (
            training.get("ignore_data_skip", False),
            "a stage goes on in the data where the one before stopped",
        ),
        f"training.lr_scheduler_type={training['lr_scheduler_type']}": (
            training["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"),
            "a stage begins at its place in the schedule",
        ),
        f"training.num_train_epochs={training['num_train_epochs']}": (
            fractional,
            "larger batches end an epoch elsewhere; choose a whole number",
        ),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise ConfigError(f"{name} does not go with pack.mode={pack.mode}: {why}")


class Staged:
    """The stage that this process is to train.

    Args:
        recipe: as :func:`continued` gives it.
        launch: what the launcher says.
        rows: of the training data.
        started: when this process began, in seconds since the epoch.

    Attributes:
        stage: the one at work.
        order: of the samples.

    Raises:
        ConfigError: settings that packing cannot keep, or a number of ranks on which the batch cannot be dealt out.
    """

    def __init__(self, recipe: Recipe, launch: Launch, rows: int, started: float) -> None:
        self._recipe, self._rows, self._started = recipe, rows, started
        check(recipe)
        self._stages = agreed(lambda: self._found(launch))
        if blind := unseen(recipe.directory / STAGES):
            raise ConfigError(
                f"output_dir={str(recipe.directory)!r} is not one directory for all hosts: "
                f"{'rank' if len(blind) == 1 else 'ranks'} {', '.join(map(str, blind))} cannot see what the first rank "
                "has written there"
            )
        self.stage = _on(self._stages.current, ranks())
        self.order = self._order(self.stage)
        self._keeper: Keeper | None = None

    @property
    def checkpoints(self) -> Path:
        """Where this stage's checkpoints are."""
        return self.stage.checkpoints(self._folder)

    def settings(self) -> dict[str, Any]:
        """The recipe's ``training`` section as it is for this stage."""
        settings, longer = dict(self._recipe.training), self.stage.batch / self._stages.unit
        settings["per_device_train_batch_size"] = self.stage.rows
        settings["gradient_accumulation_steps"] = self.stage.accumulation
        settings["learning_rate"] = settings.get("learning_rate", TrainingArguments.learning_rate) * self.stage.rate
        if settings.get("warmup_steps", 0) >= 1:  # below 1 it is a share of the run
            settings["warmup_steps"] = max(1, round(settings["warmup_steps"] / longer))
        for name in {"logging_steps", "eval_steps", "save_steps"} & settings.keys():
            if settings[name] is not None and settings[name] >= 1:
                settings[name] = max(1, round(settings[name] / longer))
        return settings

    def watch(self, trainer: Trainer, frost: Frost) -> None:
        """Look for the next stage while ``trainer`` trains this one; ``frost`` is attached to it."""
        if self._packs and self._stages.job is None:
            self._stages.job = agreed(lambda: self._measured(trainer))
            if is_first():
                self._stages.write(self._recipe.directory)
        epochs = self._recipe.training["num_train_epochs"]
        self._keeper = Keeper(
            frost, self._stages, self.stage, self.order, self._recipe.pack, run=self._recipe.directory,
            total=epochs * self.order.samples, started=self._started,
        )  # fmt: skip
        trainer.add_callback(self._keeper)

    def has_ended(self, resume_from: Path | None) -> bool:
        """Whether the next stage has been chosen, but a kill came before it could begin: then it begins now."""
        return self._follow(agreed(lambda: behind(resume_from, self._stages)) if self._packs else None)

    def ends(self) -> bool:
        """Whether the Trainer has been stopped for the next stage, which then begins."""
        return self._follow(self._keeper.following if self._keeper is not None else None)

    # -- inside -------------------------------------------------------------------------------------

    @property
    def _packs(self) -> bool:
        return self._recipe.pack.mode != "none"

    @property
    def _folder(self) -> Path:
        return self._recipe.directory / "checkpoints"

    def _found(self, launch: Launch) -> Stages:
        """The run's stages so far; of a run that begins, the first."""
        run = self._recipe.directory
        stages = Stages.read(run) if self._recipe.resume else None
        if stages is None:
            training = self._recipe.training
            first = Stage(
                0, ranks(), training["per_device_train_batch_size"], training.get("gradient_accumulation_steps", 1)
            )
            stages = Stages(launch.name, launch.per_host, [first])
        stages.launch = launch.name
        if self._rows < stages.unit:
            raise ConfigError(f"{self._rows} training samples are less than a batch of {stages.unit} on all ranks")
        stages.write(run)
        return stages

    def _order(self, stage: Stage) -> Order:
        training = self._recipe.training
        shuffled = training.get("train_sampling_strategy", "random") == "random"
        seed = self._recipe.seed if training.get("data_seed") is None else training["data_seed"]
        # Each host keeps records of its own: a sample had better come back to the host that has seen it.
        first, caches = self._stages.stages[0], self._recipe.cache.mode != "off"
        hosts = max(1, first.ranks // self._stages.per_host) if caches else 1
        return Order(
            self._rows, self._stages.unit, stage, rank=rank(), seed=seed, shuffled=shuffled, parts=hosts
        )  # fmt: skip

    def _measured(self, trainer: Trainer) -> Job:
        recipe, first = self._recipe, self._stages.stages[0]
        pack, freeze = recipe.pack, recipe.freeze
        sizes = [
            times * first.rows for times in range(1, (pack.largest if pack.mode == "performance" else first.ranks) + 1)
        ]
        level = recipe.memory.level
        peaks = peaks_of(trainer, level, freeze.policy, freeze.options, freeze.blocks, sizes)
        cap = int(pack.memory or peaks[0][0])
        if peaks[0][0] > cap:
            raise ConfigError(
                f"pack.memory={cap}: micro-batches of {first.rows} take {peaks[0][0]} bytes in the first stage; "
                "allow more, or set a smaller training.per_device_train_batch_size"
            )
        # Sizes are timed where only the last block trains: there a larger one fits if it ever does.
        many = max((size for size, peak in zip(sizes, peaks[-2], strict=True) if peak <= cap), default=first.rows)
        seconds = row_seconds(trainer, level, freeze.blocks, first.rows, many)
        adaptive = "sgd" not in str(recipe.training["optim"])
        return Job(first.rows, peaks, seconds, cap, adaptive)

    def _follow(self, following: Stage | None) -> bool:
        if following is None:
            return False
        after = self._order(following)
        agreed(lambda: move_on(following, self._stages, self._folder, self._recipe.directory, self.order, after))
        return True


def _freezes(recipe: Recipe) -> bool:
    return recipe.freeze.policy != "none"


def _on(stage: Stage, present: int) -> Stage:
    """``stage`` on as many ranks as there are: with other accumulation, where that makes the same batch."""
    if present == stage.ranks:
        return stage
    micro = stage.batch // stage.rows
    if micro % present:
        raise ConfigError(
            f"{present} ranks are here, and stage {stage.number} has {stage.ranks}: its batch of {stage.batch} samples "
            f"is {micro} micro-batches of {stage.rows}, which cannot be dealt out evenly to {present}"
        )
    return replace(stage, ranks=present, accumulation=micro // present)
