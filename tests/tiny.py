"""Batches and plain networks for the tiny models of :mod:`tests.architectures`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCABULARY = 64
WIDTH = 32
BLOCKS = 4
LENGTH = 8
LABELS = 3
DROPOUT = 0.1

Inputs = dict[str, Tensor]


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def tokens(rows: int, generator: torch.Generator) -> Inputs:
    """Right-padded token ids (0 is padding, 1 and 2 are special) with their mask."""
    ids = integers(3, VOCABULARY, (rows, LENGTH), generator)
    mask = torch.ones_like(ids)
    mask[-1, LENGTH - 2 :] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_classes(rows: int, generator: torch.Generator) -> Inputs:
    return tokens(rows, generator) | {"labels": integers(0, LABELS, (rows,), generator)}


def next_token(rows: int, generator: torch.Generator) -> Inputs:
    batch = tokens(rows, generator)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def sequence_to_sequence(rows: int, generator: torch.Generator) -> Inputs:
    return tokens(rows, generator) | {"labels": integers(3, VOCABULARY, (rows, LENGTH - 2), generator)}


def images(size: int) -> Callable[[int, torch.Generator], Inputs]:
    def batch(rows: int, generator: torch.Generator) -> Inputs:
        return {
            "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
            "labels": integers(0, LABELS, (rows,), generator),
        }

    return batch


def audio(rows: int, generator: torch.Generator) -> Inputs:
    return {
        "input_values": torch.randn(rows, 400, generator=generator),
        "labels": integers(0, LABELS, (rows,), generator),
    }


def vectors(rows: int, generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(rows, WIDTH, generator=generator),
        "labels": integers(0, LABELS, (rows,), generator),
    }


class Residual(nn.Module):
    """A residual block with a buffer that moves in train mode, and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, width)
        self.dropout = nn.Dropout(DROPOUT)
        self.down = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.dropout(torch.relu(self.up(self.norm(x)))))
        return out


class Narrow(Residual):
    """The same under another class, so that a list of both is not homogeneous."""


class PlainNetwork(nn.Module):
    """A network whose blocks are of two classes: only an explicit path says that they are a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.entrance = nn.Linear(WIDTH, WIDTH)
        self.trunk = nn.ModuleDict(
            {"cells": nn.ModuleList((Narrow(16) if i % 2 else Residual(24)) for i in range(BLOCKS))}
        )
        self.norm = nn.BatchNorm1d(WIDTH)
        self.exit = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        """``x`` is ``[batch, width]``, ``labels`` is ``[batch]``."""
        x = self.entrance(x)
        for cell in self.trunk["cells"]:
            x = cell(x)
        logits = self.exit(self.norm(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class NoStack(nn.Module):
    """A network without anything that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 16)
        self.second = nn.Linear(16, LABELS)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        """``x`` is ``[batch, width]``, ``labels`` is ``[batch]``."""
        logits = self.second(torch.relu(self.first(x)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)
