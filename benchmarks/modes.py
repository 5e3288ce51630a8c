"""Ways to fine-tune a model of base size for less memory, side by side: what ``benchmarks/memory.py`` measures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.steps import adamw
from frostline import BlockStack, Frostline
from frostline.memory import Compressor

__all__ = ["MODES", "Mode", "Training", "build"]

# SlimFit's F: of BERT-base's 102 schedulable tensors 91 rest at a step.
RESTING = 0.9
_LORA_RANK = 8


@dataclass(frozen=True)
class Mode:
    """One way to train.

    Attributes:
        name: as the tables say it.
        attention: implementation that transformers is asked for.
        attention_dropout: probability in attention; fused kernels of the host have none.
        method: ``full``, ``checkpointing``, ``lora``, ``prefix`` (half of the blocks frozen) or ``resting``.
        level: of compression.
        moments: optimizer moments of all weights, or of those that train at the step.
    """

    name: str
    attention: str = "sdpa"
    attention_dropout: float = 0.1
    method: str = "full"
    level: str = "off"
    moments: str = "all"

    def compressed(self, level: str) -> Mode:
        return replace(self, name=f"{self.name} + {level}", level=level)


_FULL = Mode("full")
_CHECKPOINTING = Mode("gradient checkpointing", method="checkpointing")
_LORA = Mode("LoRA r=8", method="lora")
_PREFIX = Mode("half frozen", method="prefix")
_RESTING = Mode("resting 0.9", method="resting")
_ACTIVE = Mode("resting 0.9, moments of active layers", method="resting", moments="active")

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("full, eager attention", attention="eager"),
        _FULL,
        Mode("full, fused attention", attention_dropout=0.0),
        _CHECKPOINTING,
        _LORA,
        _PREFIX,
        _RESTING,
        *(_FULL.compressed(level) for level in ("safe", "slimfit", "max")),
        *(_RESTING.compressed(level) for level in ("safe", "slimfit", "published", "max")),
        *(_ACTIVE.compressed(level) for level in ("slimfit", "max")),
        *(_PREFIX.compressed(level) for level in ("slimfit", "max")),
        *(_LORA.compressed(level) for level in ("slimfit", "max")),
    )
}


class Training:
    """A model in one mode and what a step of it needs."""

    def __init__(self, mode: Mode, model: nn.Module, call: dict[str, Any]) -> None:
        self.mode, self.model, self.inputs = mode, model.train(), call
        self.every = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.every)
        self.stack = BlockStack.find(model)
        self.frost: Frostline | None = None
        self.loss = torch.zeros(())
        self.compressor = Compressor(model, mode.level) if mode.level != "off" else None

    def step(self) -> None:
        """One optimizer step."""
        # As in most loops, the last loss (and what its graph has left) is there until the next one is.
        self.loss = self.model(**self.inputs).loss
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.every, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self, seed: int) -> None:
        """Two steps: the first in full, so that all moments are there, the second as the mode has it."""
        if self.mode.method != "lora":
            self.step()
        if self.mode.method == "prefix":
            self.frost = Frostline(
                self.model, self.optimizer, policy="static", depth=len(self.stack) // 2, steps_per_epoch=1000, epochs=1
            )
        if self.mode.method == "resting":
            _rest(self.model, self.stack, seed)
        if self.mode.moments == "active":
            for parameter in self.every:
                if not parameter.requires_grad:
                    self.optimizer.state.pop(parameter, None)
        self.step()

    def tensors(self) -> Iterable[torch.Tensor]:
        """What is there between two steps: weights, buffers, moments and the batch."""
        yield from (*self.model.parameters(), *self.model.buffers(), *self.inputs.values())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def build(mode: Mode, shape: str, rows: int, length: int, seed: int, device: str) -> Training:
    """BERT-base (``shape`` ``bert``, ``rows`` x ``length`` tokens) or ViT-base (``vit``, 224 pixels) in ``mode``."""
    torch.manual_seed(seed)
    model, inputs = _SHAPES[shape](mode, rows, length)
    model.to(device)
    if mode.method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["query", "value", "q_proj", "v_proj"]
        config = LoraConfig(r=_LORA_RANK, target_modules=targets, modules_to_save=["classifier"])
        model = get_peft_model(model, config)
    if mode.method == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Training(mode, model, {key: value.to(device) for key, value in inputs.items()})


def _bert(mode: Mode, rows: int, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.BertConfig(
        num_labels=2, attn_implementation=mode.attention, attention_probs_dropout_prob=mode.attention_dropout
    )
    ids = torch.randint(3, config.vocab_size, (rows, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (rows,))}
    return transformers.BertForSequenceClassification(config), inputs


def _vit(mode: Mode, rows: int, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.ViTConfig(num_labels=10, attn_implementation=mode.attention)
    inputs = {"pixel_values": torch.randn(rows, 3, 224, 224), "labels": torch.randint(0, 10, (rows,))}
    return transformers.ViTForImageClassification(config), inputs


_SHAPES: dict[str, Callable[[Mode, int, int], tuple[Any, dict[str, torch.Tensor]]]] = {"bert": _bert, "vit": _vit}


def _rest(model: nn.Module, stack: BlockStack, seed: int) -> None:
    """Rest a random nine tenths of the tensors that SlimFit schedules (all but biases); the head trains."""
    head = set(stack.parameters_of("head"))
    layers = [(n, p) for n, p in model.named_parameters() if not n.endswith("bias") and n not in head]
    for _, parameter in random.Random(seed).sample(layers, int(RESTING * len(layers))):
        parameter.requires_grad_(False)
        parameter.grad = None
