"""Text classification: from labelled text and a model's name to what a Trainer needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from frostline.errors import ConfigError, ModelError
from frostline.tasks import assets
from frostline.tasks.data import DataSpec, quiet_datasets, read_splits

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        DataCollatorWithPadding,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

__all__ = ["Prepared", "build_model", "compute_metrics", "model_path", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a Trainer needs besides the model.

    The data sets hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the model takes them, and
    ``labels`` (an index into :attr:`labels`); rows have their own length and ``collator`` pads each batch to its
    longest one. ``test`` is None where the data have none.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    collator: DataCollatorWithPadding
    labels: list[str]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]


def prepare(spec: DataSpec, model: str, max_length: int = 128) -> Prepared:
    """Read the data and tokenise them for ``model`` (an asset, a local folder or a hub id), all in memory.

    ``max_length`` is in tokens, special ones included; longer texts are cut (of a pair, the longer text first).

    Raises :class:`DataError` as :func:`read_splits` does, :class:`ModelError` where the model has no tokenizer, and
    :class:`ConfigError` for a ``max_length`` that the model cannot take.
    """
    from transformers import DataCollatorWithPadding

    splits = read_splits(spec)
    tokenizer = _load_tokenizer(model)
    special = tokenizer.num_special_tokens_to_add(pair=spec.text_pair_column is not None)
    if not special < max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"max_length={max_length}: must be above {special} (the special tokens) and at most "
            f"{tokenizer.model_max_length} (what {model!r} takes)"
        )

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length, padding=False)
        return {**encoded, "labels": rows["label"]}

    tokenised = {}
    with quiet_datasets():
        for split, rows in splits.items():
            # The fingerprint is given because the default one pickles the tokenizer to hash it, for a cache that
            # in-memory data do not have.
            tokenised[split] = rows.map(
                tokenise,
                batched=True,
                remove_columns=rows.column_names,
                keep_in_memory=True,
                load_from_cache_file=False,
                new_fingerprint=f"frostline-{split}",
            )
    return Prepared(
        train=tokenised["train"],
        validation=tokenised["validation"],
        test=tokenised.get("test"),
        tokenizer=tokenizer,
        collator=DataCollatorWithPadding(tokenizer),
        labels=list(splits["train"].features["label"].names),
        compute_metrics=compute_metrics,
    )


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


def build_model(prepared: Prepared, model_name_or_path: str, seed: int) -> PreTrainedModel:
    """Load a model (an asset, a local folder or a hub id) in fp32 with a classification head for the labels.

    Weights that the checkpoint lacks (the head) are drawn from ``seed``; the global random state is left as it was.

    Raises :class:`ModelError` where nothing can be loaded, or a head of another size is in the checkpoint.
    """
    from transformers import AutoModelForSequenceClassification

    labels = prepared.labels
    path = model_path(model_name_or_path)
    try:
        with _quiet_transformers(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model: PreTrainedModel
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise ModelError(
                f"{model_name_or_path!r} has a classification head for other classes than the {len(labels)} of the "
                f"data ({', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}): name the model it was made from"
            ) from error
        raise ModelError(f"cannot load model {model_name_or_path!r}: {_first_line(error)}") from error
    backbone = sorted(key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if backbone:
        # The library's own report is silenced because the head is always in it; what else is missing must be said.
        logger.warning("%s lacks %d weights, drawn at random: %s", model_name_or_path, len(backbone), backbone[:5])
    if model.config.pad_token_id is None:
        # GPT-2 and Llama classify the last token that is no padding, so they must know which one that is.
        model.config.pad_token_id = prepared.tokenizer.pad_token_id
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


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    path = model_path(model)
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load the tokenizer of {model!r}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {model!r} has neither a padding token nor an end token to pad with")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No load report ("newly initialised weights") and no bar over weight files inside."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
