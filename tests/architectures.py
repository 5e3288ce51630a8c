"""Tiny random models of every architecture the laws are tested on.

Each has four blocks of width 32 and builds in milliseconds, seeded and without any download. Dropout is
on everywhere, so that a prefix which is not in eval mode shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.tiny import (
    BLOCKS,
    DROPOUT,
    LABELS,
    VOCABULARY,
    WIDTH,
    Inputs,
    NoStack,
    PlainNetwork,
    audio,
    images,
    next_token,
    sequence_to_sequence,
    text_classes,
    vectors,
)

__all__ = ["ARCHITECTURES", "REFUSED", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """One model of the matrix.

    ``make`` builds the model, ``batch(rows, generator)`` a batch with labels, so that
    ``model(**inputs).loss`` works. ``path`` is given only where the stack cannot be found without it;
    ``stack`` is the dotted path of the stack that should be found (``None``: any). ``tied`` says that a
    stem weight is used after the blocks too. ``outside`` says that randomness is drawn, or a mode kept,
    beside the blocks (a dropout in the model's own forward, SpecAugment, layer drop).
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Inputs]
    blocks: int = BLOCKS
    path: str | None = None
    stack: str | None = None
    tied: bool = False
    outside: bool = False
    error: str = ""
    note: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model in train mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        return self.make().train()

    def inputs(self, batch: int = 4, seed: int = 0) -> Inputs:
        """One batch with labels; the same seed gives the same batch."""
        return self.batch(batch, torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        return self.name


# What most encoder configurations of transformers call the same.
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": DROPOUT,
    "attention_probs_dropout_prob": DROPOUT,
    "num_labels": LABELS,
    "pad_token_id": 0,
}

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "attention_dropout": DROPOUT,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _hf(family: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    """A factory for ``transformers.<family><head>`` with ``<family>Config(**options)``."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**options)
        model: nn.Module = getattr(transformers, f"{family}{head}")(config)
        return model

    return make


def _lora_bert() -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_dropout=DROPOUT, target_modules=["query", "value"])
    model: nn.Module = get_peft_model(_hf("Bert", "ForSequenceClassification", **_ENCODER)(), config)
    return model


# What ViT and its relatives call the same; 2 x 2 patches.
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": DROPOUT,
    "attention_probs_dropout_prob": DROPOUT,
    "num_labels": LABELS,
}

_CLASSES = "ForSequenceClassification"

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("bert", _hf("Bert", _CLASSES, **_ENCODER), text_classes, stack="bert.encoder.layer"),
    Architecture(
        "distilbert",
        _hf(
            "DistilBert",
            _CLASSES,
            vocab_size=VOCABULARY,
            dim=WIDTH,
            hidden_dim=48,
            n_layers=BLOCKS,
            n_heads=2,
            max_position_embeddings=32,
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
            num_labels=LABELS,
        ),
        text_classes,
        stack="distilbert.transformer.layer",
    ),
    Architecture("roberta", _hf("Roberta", _CLASSES, **_ENCODER), text_classes, stack="roberta.encoder.layer"),
    Architecture(
        "electra",
        _hf("Electra", _CLASSES, **_ENCODER, embedding_size=16),
        text_classes,
        stack="electra.encoder.layer",
        note="the stem is the embeddings and a projection beside them",
    ),
    Architecture(
        "deberta-v2",
        _hf(
            "DebertaV2",
            _CLASSES,
            **_ENCODER,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            conv_kernel_size=3,
            conv_act="gelu",
            pooler_hidden_size=WIDTH,
        ),
        text_classes,
        stack="deberta.encoder.layer",
        note="every block reads the encoder's rel_embeddings; a convolution follows block 0",
    ),
    Architecture(
        "modernbert",
        _hf(
            "ModernBert",
            _CLASSES,
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            max_position_embeddings=32,
            global_attn_every_n_layers=2,
            local_attention=4,
            embedding_dropout=DROPOUT,
            mlp_dropout=DROPOUT,
            attention_dropout=DROPOUT,
            classifier_dropout=DROPOUT,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            num_labels=LABELS,
        ),
        text_classes,
        stack="model.layers",
    ),
    Architecture(
        "mpnet",
        _hf("MPNet", _CLASSES, **_ENCODER),
        text_classes,
        stack="mpnet.encoder.layer",
        note="every block reads the encoder's relative_attention_bias",
    ),
    Architecture(
        "gpt2",
        _hf(
            "GPT2",
            "LMHeadModel",
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=WIDTH,
            n_layer=BLOCKS,
            n_head=2,
            n_inner=48,
            resid_pdrop=DROPOUT,
            embd_pdrop=DROPOUT,
            attn_pdrop=DROPOUT,
            bos_token_id=1,
            eos_token_id=2,
        ),
        next_token,
        stack="transformer.h",
        tied=True,
        outside=True,
        note="the head is the embedding table; a dropout stands beside the stack",
    ),
    Architecture(
        "llama-lm",
        _hf("Llama", "ForCausalLM", **_DECODER, tie_word_embeddings=True),
        next_token,
        stack="model.layers",
        tied=True,
    ),
    Architecture("llama-classes", _hf("Llama", _CLASSES, **_DECODER), text_classes, stack="model.layers"),
    Architecture("qwen2", _hf("Qwen2", _CLASSES, **_DECODER), text_classes, stack="model.layers"),
    Architecture(
        "vit",
        _hf(
            "ViT",
            "ForImageClassification",
            **_VISION,
            intermediate_size=48,
        ),
        images(16),
    ),
    Architecture(
        "dinov2",
        _hf(
            "Dinov2",
            "ForImageClassification",
            **_VISION,
            mlp_ratio=2,
            drop_path_rate=DROPOUT,
        ),
        images(16),
    ),
    Architecture(
        "convnext",
        _hf(
            "ConvNext",
            "ForImageClassification",
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            patch_size=2,
            drop_path_rate=DROPOUT,
            num_labels=LABELS,
        ),
        images(32),
        note="four stages of one residual block",
    ),
    Architecture(
        "wav2vec2",
        _hf(
            "Wav2Vec2",
            _CLASSES,
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout=DROPOUT,
            attention_dropout=DROPOUT,
            feat_proj_dropout=DROPOUT,
            conv_dim=[16, 16],
            conv_kernel=[10, 3],
            conv_stride=[5, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            apply_spec_augment=True,
            mask_time_prob=0.3,
            mask_time_length=2,
            layerdrop=DROPOUT,
            classifier_proj_size=16,
            num_labels=LABELS,
        ),
        audio,
        stack="wav2vec2.encoder.layers",
        outside=True,
        note="SpecAugment and layer drop act beside the blocks",
    ),
    Architecture(
        "t5",
        _hf(
            "T5",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=16,
            d_ff=48,
            num_layers=BLOCKS,
            num_decoder_layers=BLOCKS,
            num_heads=2,
            relative_attention_num_buckets=8,
            dropout_rate=DROPOUT,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
        sequence_to_sequence,
        stack="encoder.block",
        tied=True,
        outside=True,
        note="two stacks (the decoder has more parameters); block 0 makes the position bias of all blocks",
    ),
    Architecture(
        "bart",
        _hf(
            "Bart",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=BLOCKS,
            decoder_layers=BLOCKS,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=32,
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
            activation_dropout=DROPOUT,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        sequence_to_sequence,
        stack="model.encoder.layers",
        tied=True,
        outside=True,
        note="two stacks (the decoder has more parameters)",
    ),
    Architecture(
        "resnet",
        _hf(
            "ResNet",
            "ForImageClassification",
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="basic",
            num_labels=LABELS,
        ),
        images(16),
        note="two stages of two residual blocks; BatchNorm",
    ),
    Architecture("plain", PlainNetwork, vectors, path="trunk.cells", stack="trunk.cells", note="BatchNorm"),
    Architecture("lora-bert", _lora_bert, text_classes, note="the base is born frozen and stays so"),
)

# Models that cannot be frozen by depth; `error` is a pattern that the message must match.
REFUSED: tuple[Architecture, ...] = (
    Architecture(
        "albert",
        _hf("Albert", _CLASSES, **_ENCODER, embedding_size=16),
        text_classes,
        blocks=1,
        error=r"(?i)shar",
        note="one block, run four times",
    ),
    Architecture("no-stack", NoStack, vectors, blocks=0, error=r"(?i)no (stack|block)|path"),
)
