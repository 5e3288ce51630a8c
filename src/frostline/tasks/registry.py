"""The tasks a recipe can name: what each reads, how it is prepared, and which model is built for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from frostline.tasks import image_classification, text_classification
from frostline.tasks.classification import Prepared
from frostline.tasks.data import DataSpec, ImageSpec, TextSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what a recipe calls it.
        spec: its section ``data``.
        size: the key of a recipe that says how large one sample is.
        default_size: of that key where the recipe says nothing; None: the model's own.
        prepare: data spec, model and size to what a Trainer needs.
        build_model: prepared data, model and seed to the untrained model.
    """

    name: str
    spec: type[DataSpec]
    size: str
    default_size: int | None
    prepare: Callable[[Any, str, Any], Prepared]
    build_model: Callable[[Prepared, str, int], PreTrainedModel]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                "text-classification",
                TextSpec,
                "max_length",
                128,
                text_classification.prepare,
                text_classification.build_model,
            ),
            Task(
                "image-classification",
                ImageSpec,
                "image_size",
                None,
                image_classification.prepare,
                image_classification.build_model,
            ),
        )
    }
)
