"""What every classification task shares: prepared data, metrics, and loading a model with a head for the classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from frostline.errors import ModelError
from frostline.tasks import assets
from frostline.tasks._quiet import quiet_transformers

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        BaseImageProcessor,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

__all__ = ["Prepared", "compute_metrics", "first_line", "load_classifier", "model_path"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a Trainer needs besides the model.

    The data sets hold what the model takes of one sample, and ``labels`` (an index into :attr:`labels`);
    ``collator`` makes a batch of rows. ``processor`` is saved beside the model. ``test`` is None where the data have
    none.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    processor: PreTrainedTokenizerBase | BaseImageProcessor
    collator: Callable[[list[dict[str, Any]]], MutableMapping[str, Any]]
    labels: list[str]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """``accuracy`` and ``macro_f1`` (over the classes that occur, as label or as prediction), both 0..1.

    ``prediction.predictions`` are logits of shape (rows, classes), or a tuple that starts with them.
    """
    from sklearn.metrics import accuracy_score, f1_score

    outputs = prediction.predictions
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    chosen = np.argmax(logits, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, chosen)),
        "macro_f1": float(f1_score(prediction.label_ids, chosen, average="macro", zero_division=0.0)),
    }


def load_classifier(
    factory: Any, labels: list[str], model_name_or_path: str, seed: int, *, replace_head: bool
) -> PreTrainedModel:
    """Load a model (an asset, a local folder or a hub id) in fp32 with a classification head for ``labels``.

    Weights that the checkpoint lacks (the head) are drawn from ``seed``; the global random state is left as it was.

    Args:
        factory: the class of ``transformers`` that builds the model (``AutoModelFor...``).
        labels: the classes in order.
        model_name_or_path: what to load.
        seed: of the weights that are drawn.
        replace_head: a head of another size in the checkpoint is drawn anew, too, instead of being an error.

    Raises:
        ModelError: nothing can be loaded, or a head of another size is in the checkpoint.
    """
    path = model_path(model_name_or_path)
    try:
        with quiet_transformers(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model: PreTrainedModel
            model, report = factory.from_pretrained(
                path,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
                dtype=torch.float32,
                ignore_mismatched_sizes=replace_head,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise ModelError(
                f"{model_name_or_path!r} has a classification head for other classes than the {len(labels)} of the "
                f"data ({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}): name the model it was made from"
            ) from error
        raise ModelError(f"cannot load model {model_name_or_path!r}: {first_line(error)}") from error
    drawn = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    backbone = sorted(key for key in drawn if key.startswith(f"{model.base_model_prefix}."))
    if backbone:
        # The library's own report is silenced because the head is always in it; what else is missing must be said.
        logger.warning("%s lacks %d weights, drawn at random: %s", model_name_or_path, len(backbone), backbone[:5])
    return model


def model_path(model: str) -> str:
    """The folder or hub id of ``model``; a data set's name, or a folder without a model, is an error."""
    if model in assets.ASSETS and assets.ASSETS[model].kind != "model":
        models = [name for name, asset in assets.ASSETS.items() if asset.kind == "model"]
        raise ModelError(f"asset {model!r} is no model; the models are: {', '.join(models)}")
    path = assets.resolve(model)
    local = Path(path).expanduser()
    if local.exists() and not (local / "config.json").is_file():
        raise ModelError(f"{model!r} is no Hugging Face model folder: it has no config.json")
    return str(local) if local.exists() else path


def first_line(error: Exception) -> str:
    """What an error says, shortened to a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
