"""Ways to fine-tune a model of base size for less memory, side by side: what ``benchmarks/memory.py`` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.steps import adamw
from frostline import BlockStack, Frostline
from frostline.memory import Compressor

__all__ = ["MODES", "Mode", "Training", "build"]

# SlimFit's F, ranked as published: of BERT-base's 102 schedulable tensors 91 rest at a step.
RESTING = 0.9
_LORA_RANK = 8
# Steps after which a cache of one batch must be full.
_MOST_STEPS = 8


@dataclass(frozen=True)
class Mode:
    """One way to train.

    Attributes:
        name: as the tables say it.
        attention: implementation that transformers is asked for.
        attention_dropout: probability in attention; fused kernels of the host have none.
        lora: whether adapters train in place of the weights.
        checkpointing: of every block.
        frozen: share of the blocks below the frost line.
        cached: whether what comes out of them is kept in host memory.
        resting: share of the layers above it that rest at each step (policy ``interlayer``).
        within: which layers are ranked together, ``model`` (as published) or ``kind``.
        level: of compression.
        moments: optimizer moments of all weights, or of those that train at the step.
        parts: micro-batches in a step.
    """

    name: str
    attention: str = "sdpa"
    attention_dropout: float = 0.1
    lora: bool = False
    checkpointing: bool = False
    frozen: float = 0.0
    cached: bool = False
    resting: float = 0.0
    within: str = "model"
    level: str = "off"
    moments: str = "all"
    parts: int = 1

    def compressed(self, level: str) -> Mode:
        return replace(self, name=f"{self.name} + {level}", level=level)

    def checkpointed(self) -> Mode:
        return replace(self, name=f"{self.name} + checkpointing", checkpointing=True)


_FULL = Mode("full")
_CHECKPOINTING = Mode("gradient checkpointing", checkpointing=True)
_LORA = Mode("LoRA r=8", lora=True)
_PREFIX = Mode("half frozen", frozen=0.5)
_CACHED = Mode("half frozen, cached", frozen=0.5, cached=True)
_RESTING = Mode("resting 0.9", resting=RESTING)
_KINDS = Mode("resting 0.9 of each kind", resting=RESTING, within="kind")
_UNASKED = Mode("resting 0.34 of each kind", resting=0.34, within="kind")  # what policy ``interlayer`` takes unasked
_ACTIVE = Mode("resting 0.9, moments of active layers", resting=RESTING, moments="active")
_ACTIVE_KINDS = Mode(
    "resting 0.9 of each kind, moments of active layers", resting=RESTING, within="kind", moments="active"
)

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("full, eager attention", attention="eager"),
        _FULL,
        Mode("full, fused attention", attention_dropout=0.0),
        _CHECKPOINTING,
        _LORA,
        _PREFIX,
        _CACHED,
        _RESTING,
        _ACTIVE,
        _UNASKED,
        *(_FULL.compressed(level) for level in ("safe", "slimfit", "max")),
        *(_RESTING.compressed(level) for level in ("safe", "slimfit", "published", "max")),
        *(_ACTIVE.compressed(level) for level in ("slimfit", "max")),
        *(mode.compressed("slimfit") for mode in (_UNASKED, _KINDS, _ACTIVE_KINDS)),
        *(_PREFIX.compressed(level) for level in ("slimfit", "max")),
        *(_LORA.compressed(level) for level in ("slimfit", "max")),
    )
}


class Training:
    """A model in one mode and what a step of it needs."""

    def __init__(self, mode: Mode, model: nn.Module, call: dict[str, Any], *, autocast: bool = False) -> None:
        device = next(model.parameters()).device.type
        self.precision: Any = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
        self.mode, self.model, self.inputs = mode, model.train(), call
        self.every = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.every)
        self.stack = BlockStack.find(model)
        self.frost: Frostline | None = None
        self.compressor: Compressor | None = None
        self.loss = torch.zeros(())
        parts = [value.chunk(mode.parts) for value in call.values()]
        self.parts: list[dict[str, torch.Tensor]] = [
            dict(zip(call, values, strict=True)) for values in zip(*parts, strict=True)
        ]

    def step(self) -> None:
        """One optimizer step."""
        for part in self.parts:
            # As in most loops, the last loss (and what its graph has left) is there until the next one is.
            with self.precision:
                self.loss = self.model(**part).loss / self.mode.parts
            self.loss.backward()
        if self.frost is not None:
            self.frost.before_step()
        nn.utils.clip_grad_norm_(self.every, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.frost is not None:
            self.frost.after_step()

    def settle(self, seed: int) -> None:
        """Steps until the next is like all that follow: the first in full, so that all moments are there."""
        mode = self.mode
        if not mode.lora:
            self.step()
        if mode.frozen or mode.resting:
            line = {"policy": "static", "depth": int(mode.frozen * len(self.stack))}
            options: dict[str, Any] = line
            if mode.resting:
                moments = "drop" if mode.moments == "active" else "keep"
                options = {
                    "policy": "interlayer", "share": mode.resting, "within": mode.within, "seed": seed,
                    "moments": moments,
                }  # fmt: skip
                options |= {"line": line} if mode.frozen else {}
            self.frost = Frostline(
                self.model, self.optimizer, cache="memory" if mode.cached else "off", steps_per_epoch=1, epochs=10_000,
                batch_size=next(iter(self.inputs.values())).shape[0], **options,
            )  # fmt: skip
        self.compress()
        self.step()
        for _ in range(_MOST_STEPS):
            if self._reads_all():
                return
        raise RuntimeError(f"{mode.name}: the cache does not hold the batch: {self.cache}")

    def compress(self) -> None:
        """Have passes packed from here on, where the mode says so."""
        if self.mode.level != "off":
            self.compressor = Compressor(self.model, self.mode.level, entries=self.stack.ancestors())

    def take_the_heaviest_turn(self) -> None:
        """Where layers take turns: at the next step those train that take most of memory."""
        if not self.mode.resting or self.frost is None:
            return
        rows = next(iter(self.parts[0].values()))
        tokens = rows.shape[0] * (rows.shape[1] if rows.dim() == 2 else 1)
        sizes = {
            name: 4 * (parameter.numel() + tokens * parameter.shape[-1])
            for name, parameter in self.stack.model.named_parameters()
        }
        self.frost.freezer.apply(self.frost.policy.heaviest(sizes))

    @property
    def cache(self) -> dict[str, Any] | None:
        """What the cache says of itself, where there is one."""
        found: dict[str, Any] | None = self.frost.summary()["cache"] if self.frost is not None else None
        return found

    def _reads_all(self) -> bool:
        """Whether a step reads all of its samples from the cache, or has none."""
        before = self.cache
        if before is None:
            return True
        self.step()
        after = self.cache
        assert after is not None
        return bool(after["hits"] > before["hits"] and after["misses"] == before["misses"])

    def tensors(self) -> Iterable[torch.Tensor]:
        """What is there between two steps: weights, buffers, moments and the batch."""
        yield from (*self.model.parameters(), *self.model.buffers(), *self.inputs.values())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def build(
    mode: Mode, shape: str, rows: int, length: int, seed: int, device: str, *, autocast: bool = False
) -> Training:
    """BERT-base (``shape`` ``bert``, ``rows`` x ``length`` tokens) or ViT-base (``vit``, 224 pixels) in ``mode``.

    ``autocast``: whether forward passes are in bfloat16.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model, inputs = _SHAPES[shape](mode, rows, length)
    if mode.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "value", "q_proj", "v_proj"]
        config = LoraConfig(r=_LORA_RANK, target_modules=targets, modules_to_save=["classifier"])
        model = get_peft_model(model, config)
    if mode.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Training(mode, model.to(device), inputs, autocast=autocast)


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
