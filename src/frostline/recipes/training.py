"""The ``training`` section of a recipe: transformers' own ``TrainingArguments``, checked before anything runs."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

__all__ = ["DEFAULTS", "build_arguments", "checked_training"]

DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 3,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    # Two, so that a checkpoint torn by a kill leaves a whole one behind.
    "save_total_limit": 2,
    # A fraction: 50 points on the loss curve whatever the length of the run.
    "logging_steps": 0.02,
    "disable_tqdm": True,
}
"""What a recipe gets where it says nothing."""

_ELSEWHERE = {
    "output_dir": "set output_dir at the top level of the recipe",
    "seed": "set seed at the top level of the recipe",
    "resume_from_checkpoint": "set resume at the top level of the recipe",
    "restore_callback_states_from_checkpoint": "Frostline restores its own state",
    "do_train": "a recipe always trains",
    "do_eval": "set training.eval_strategy",
    "do_predict": "a recipe always evaluates on the test split at the end",
}

_AT_LEAST = {
    "learning_rate": 0.0,
    "num_train_epochs": 0.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "warmup_steps": 0.0,
}


def checked_training(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` over the defaults; every fault at once as a ``ValueError``, one a line.

    Values are checked against the types of ``TrainingArguments`` and then by building it.
    """
    hints = typing.get_type_hints(TrainingArguments)
    known = [name for name in TrainingArguments.__dataclass_fields__ if name not in _ELSEWHERE]
    settings, faults = dict(DEFAULTS), []
    for key, value in given.items():
        if key in _ELSEWHERE:
            faults.append(f"{key} is not set here: {_ELSEWHERE[key]}")
        elif key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see transformers.TrainingArguments"
            faults.append(f"unknown key {key!r}: {hint}")
        else:
            try:
                checked = TypeAdapter(hints[key]).validate_python(value)
            except ValidationError as error:
                faults.append(f"{key}={value!r}: {error.errors()[0]['msg']}")
                continue
            # Written so that NaN fails too.
            if key in _AT_LEAST and checked is not None and not checked >= _AT_LEAST[key]:
                faults.append(f"{key}={value!r}: must be at least {_AT_LEAST[key]:g}")
            else:
                settings[key] = checked
    try:
        build_arguments(settings, Path("unused"), seed=0)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        faults.append(" ".join(str(error).split()))
    if faults:
        raise ValueError("\n".join(faults))
    return settings


def build_arguments(settings: dict[str, Any], output_dir: Path, *, seed: int) -> TrainingArguments:
    """The ``TrainingArguments`` of a run whose checkpoints go to ``output_dir``."""
    # Pinned memory is of use to an accelerator only, and torch warns at each epoch where there is none.
    machine = {"dataloader_pin_memory": torch.accelerator.is_available()}
    return TrainingArguments(output_dir=str(output_dir), seed=seed, **(machine | settings))
