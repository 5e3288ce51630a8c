"""What a recipe may say, and reading one: every fault is reported at once, one line each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from frostline.cache import CacheOptions
from frostline.errors import ConfigError, choices_message
from frostline.memory import MemoryOptions
from frostline.packing import PackOptions
from frostline.policies.registry import validate
from frostline.recipes.document import apply_overrides, read_yaml
from frostline.recipes.library import recipe_path
from frostline.recipes.training import checked_training
from frostline.tasks.data import DataSpec
from frostline.tasks.registry import TASKS, Task

__all__ = ["FreezeSection", "Recipe", "Schedule", "load_recipe"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FreezeSection(_Section):
    """``policy`` and that policy's own options.

    ``blocks`` is the dotted path of the block stack (null: found), ``max_depth_changes`` a bound on the moves of the
    frost line (null: none, but 6 under ``torch_compile``).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    policy: str = "gradient-norm"
    blocks: str | None = None
    max_depth_changes: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _options_fit_the_policy(self) -> FreezeSection:
        validate(self.policy, self.options, type(self).model_fields)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The policy's own options, as given."""
        return dict(self.model_extra or {})


class Schedule(_Section):
    """A piecewise-constant learning rate: from fraction ``at[i]`` of the run it is ``factor[i]`` times the full one."""

    at: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(min_length=1)
    factor: list[Annotated[float, Field(ge=0.0)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs_in_order(self) -> Schedule:
        if len(self.at) != len(self.factor):
            raise ValueError(f"at has {len(self.at)} values and factor {len(self.factor)}: they must be as many")
        if sorted(set(self.at)) != self.at:
            raise ValueError(f"at={self.at}: the fractions must increase")
        return self

    def at_step(self, step: int, steps: int) -> float:
        """The factor that holds for optimizer step ``step`` (from 0) of ``steps``."""
        current = 1.0
        for fraction, factor in zip(self.at, self.factor, strict=True):
            # Rounded up so that a fraction never takes effect early.
            if step >= math.ceil(fraction * steps):
                current = factor
        return current


class Recipe(_Section):
    """One fine-tuning run, end to end; ``training`` holds its ``TrainingArguments``, our defaults filled in."""

    name: str = Field(default="recipe", pattern=r"^[\w.-]+$", description="names the default output directory")
    task: str = Field(default="text-classification", description="one of frostline.tasks.registry.TASKS")
    model: str = Field(min_length=1, description="a fetched asset, a local folder or a hub id")
    # Each task has its own kind, checked below; as any, so that writing keeps the columns that it adds.
    data: SerializeAsAny[DataSpec]
    max_length: int | None = Field(
        default=None, ge=2, validate_default=True, description="text: tokens; longer texts are cut; null: 128"
    )
    image_size: int | None = Field(
        default=None, ge=1, validate_default=True, description="images: pixels of an edge; null: what the model says"
    )
    freeze: FreezeSection = FreezeSection()
    cache: CacheOptions = CacheOptions()
    memory: MemoryOptions = MemoryOptions()
    pack: PackOptions = PackOptions()
    schedule: Schedule | None = None
    training: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1, description="torch's threads; null leaves them alone")
    baseline: Literal["none", "full"] = "none"
    output_dir: str | None = Field(default=None, min_length=1, description="null: runs/<name>-seed<seed>")
    resume: bool = False
    overwrite: bool = False

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(choices_message("task", value, TASKS))
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _data_of_the_task(cls, value: Any, info: ValidationInfo) -> DataSpec:
        task = _task(info)
        # Of an unknown task, which is a fault already, nobody can say what its data may hold.
        return DataSpec.model_construct(source="") if task is None else task.spec.model_validate(value)

    @field_validator("max_length", "image_size")
    @classmethod
    def _size_of_the_task(cls, value: int | None, info: ValidationInfo) -> int | None:
        task = _task(info)
        if task is None:
            return value
        if info.field_name == task.size:
            return task.default_size if value is None else value
        if value is not None:
            raise ValueError(f"task {task.name!r} does not have it: the size of its samples is {task.size}")
        return None

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return checked_training(value)

    @model_validator(mode="after")
    def _settings_agree(self) -> Recipe:
        if self.resume and self.overwrite:
            raise ValueError("resume=true and overwrite=true exclude each other: choose one")
        left_open = validate(self.freeze.policy, self.freeze.options).undecided
        if left_open is not None and self.memory.budget is None:
            raise ValueError(
                f"freeze.{left_open}=auto is for a memory budget to choose: set memory.budget, or {left_open} itself"
            )
        clash = sorted({"warmup_steps", "lr_scheduler_kwargs"} & self.training.keys())
        if self.training["lr_scheduler_type"] != "linear":
            clash.append("lr_scheduler_type")
        if self.schedule is not None and clash:
            raise ValueError(f"schedule and training.{clash[0]} both set the learning rate: drop one (schedule=null)")
        return self

    @property
    def sample_size(self) -> int | None:
        """How large one sample is, in what the task counts: tokens of a text, pixels of an image's edge."""
        size: int | None = getattr(self, TASKS[self.task].size)
        return size

    @property
    def directory(self) -> Path:
        """Where the run goes."""
        return Path(self.output_dir or f"runs/{self.name}-seed{self.seed}").expanduser()


def _task(info: ValidationInfo) -> Task | None:
    """The task of the recipe that is being checked; None where it is not known."""
    return TASKS.get(info.data.get("task", ""))


_SECTIONS: dict[str, type[BaseModel]] = {
    "cache": CacheOptions,
    "memory": MemoryOptions,
    "pack": PackOptions,
    "schedule": Schedule,
}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a YAML file, with dotted overrides (``freeze.percentile=75``).

    Raises:
        ConfigError: an unknown recipe, malformed YAML, or settings that are wrong: all of them, one line each.
    """
    path = recipe_path(name_or_path)
    content = apply_overrides(read_yaml(path), overrides or [])
    content.setdefault("name", path.stem)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        task = TASKS.get(str(content.get("task", Recipe.model_fields["task"].default)))
        sections = _SECTIONS if task is None else {**_SECTIONS, "data": task.spec}
        faults = [line for fault in error.errors() for line in _fault_lines(fault, sections)]
    if len(faults) == 1:
        raise ConfigError(f"recipe {name_or_path}: {faults[0]}")
    listed = "".join(f"\n  {line}" for line in faults)
    raise ConfigError(f"recipe {name_or_path} has {len(faults)} faults:{listed}")


def _fault_lines(fault: Any, sections: dict[str, type[BaseModel]]) -> list[str]:
    """One pydantic error as lines that a user can act on; ``sections`` say which keys each section knows."""
    location = [str(part) for part in fault["loc"]]
    where = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = sections.get(location[0], Recipe)
        prefix = ".".join(location[:-1])
        known = [key for key in section.model_fields if (section is not Recipe or key != "name")]
        return [choices_message(f"key{f' in {prefix}' if prefix else ''}", location[-1], known)]
    if fault["type"] == "missing":
        return [f"{where}: missing; it is required"]
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return [f"{where}: {line}" if where else line for line in message.split("\n")]
    return [f"{where}={fault['input']!r}: {message}"]
