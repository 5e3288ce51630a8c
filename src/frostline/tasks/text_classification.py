"""Text classification: from labelled text and a model's name to what a Trainer needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from frostline.errors import ConfigError, ModelError
from frostline.tasks._quiet import quiet_datasets, quiet_transformers
from frostline.tasks.classification import Prepared, compute_metrics, first_line, load_classifier, model_path
from frostline.tasks.data import TextSpec, read_splits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_model", "prepare"]


def prepare(spec: TextSpec, model: str, max_length: int = 128) -> Prepared:
    """Read the data and tokenise them for ``model`` (an asset, a local folder or a hub id), all in memory.

    ``max_length`` is in tokens, special ones included; longer texts are cut (of a pair, the longer text first). Rows
    hold ``input_ids``, ``attention_mask`` and ``token_type_ids`` where the model takes them, each of its own length;
    the collator pads a batch to its longest row.

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
        processor=tokenizer,
        collator=DataCollatorWithPadding(tokenizer),
        labels=list(splits["train"].features["label"].names),
        compute_metrics=compute_metrics,
    )


def build_model(prepared: Prepared, model_name_or_path: str, seed: int) -> PreTrainedModel:
    """Load a model (an asset, a local folder or a hub id) in fp32 with a classification head for the labels.

    Weights that the checkpoint lacks (the head) are drawn from ``seed``; the global random state is left as it was.

    Raises :class:`ModelError` where nothing can be loaded, or a head of another size is in the checkpoint.
    """
    from transformers import AutoModelForSequenceClassification

    model = load_classifier(
        AutoModelForSequenceClassification, prepared.labels, model_name_or_path, seed, replace_head=False
    )
    if model.config.pad_token_id is None:
        tokenizer: Any = prepared.processor
        # GPT-2 and Llama classify the last token that is no padding, so they must know which one that is.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    path = model_path(model)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load the tokenizer of {model!r}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {model!r} has neither a padding token nor an end token to pad with")
    return tokenizer
