"""``Frostline`` under Accelerate: prepared objects, accumulation, clipping and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import frostline
from frostline.errors import ResumeError
from tests.adapters.hosts import RAMP, assert_ordinary, batches, bert, plain_sums
from tests.adapters.loops import RATE, decisions, loader, weights

GRADIENTS: dict[str, Any] = {"policy": "gradient-norm", "percentile": 100.0, "evaluations_per_epoch": 4}


class Loop:
    """Two epochs of eight optimizer steps; ``train`` may stop anywhere and go on."""

    def __init__(
        self,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        precision: str = "no",
        momentum: float = 0.9,
        seed: int = 0,
        **options: Any,
    ) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()  # a Trainer before this may have left its loader there
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        model = bert(seed=seed)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum), loader(size=8 // accumulate)
        )
        self.frost = frostline.Frostline(
            self.model, self.optimizer, steps_per_epoch=8, epochs=2, batch_size=8, **options
        )
        self.accelerator.register_for_checkpointing(self.frost)
        self.clip = clip
        self.frozen: list[int] = []

    def train(self, first: int, last: int) -> None:
        """Micro-batches ``first`` to ``last`` of the run."""
        model = self.accelerator.unwrap_model(self.model)
        everything = [batch for _ in range(2) for batch in self.loader]
        for index in range(first, last):
            self.model.train()
            before = weights(model)
            still = {n for n, p in model.named_parameters() if not p.requires_grad}
            # ``everything`` holds both epochs at once: say where a window ends, as the loader itself would.
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**everything[index]).loss)
                if self.accelerator.sync_gradients:
                    self.frost.before_step()
                    if self.clip:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.frost.after_step()
                    self.frozen.append(len(still))
            assert not {n for n in still if not torch.equal(dict(model.named_parameters())[n], before[n])}


@pytest.mark.parametrize("settings", [{}, {"clip": 1e-3}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_setting(settings: dict[str, Any]) -> None:
    loop = Loop(**settings, **RAMP)
    loop.train(0, 16 * settings.get("accumulate", 1))
    assert [(m["step"], m["depth"]) for m in loop.frost.summary()["trajectory"]] == [(6, 1), (12, 2), (16, 3)]
    assert loop.frozen == [0] * 6 + [21] * 6 + [37] * 4
    loop.frost.finish()
    assert_ordinary(loop.model)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_statistic_is_that_of_the_whole_unclipped_batch(clip: float | None) -> None:
    micro = batches(4)
    expected = plain_sums(bert(), [micro[i : i + 2] for i in range(0, 16, 2)], RATE, clip)
    loop = Loop(accumulate=2, clip=clip, momentum=0.0, policy="gradient-norm", evaluations_per_epoch=1)
    loop.train(0, 16)
    scores = decisions(loop.frost.log)[0]["observation"]["scores"]
    assert {int(k): v for k, v in scores.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [RAMP, GRADIENTS, {"policy": "random-blocks", "every": 3}], ids=str)
@pytest.mark.parametrize("step", [5, 8, 13])
def test_resume_through_save_state_is_exact(options: dict[str, Any], step: int, tmp_path: Path) -> None:
    whole = Loop(**options)
    whole.train(0, 16)
    first = Loop(**options)
    first.train(0, step)
    first.accelerator.save_state(str(tmp_path))
    second = Loop(seed=1, **options)
    second.accelerator.load_state(str(tmp_path))
    second.train(step, 16)
    timeless = [{k: v for k, v in loop.frost.summary().items() if k != "seconds"} for loop in (whole, second)]
    assert timeless[0] == timeless[1]
    expected, found = (_weights(loop) for loop in (whole, second))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert any(whole.frozen)


def _weights(loop: Loop) -> dict[str, Tensor]:
    return weights(loop.accelerator.unwrap_model(loop.model))


def test_state_of_another_policy(tmp_path: Path) -> None:
    first = Loop(policy="static", depth=1)
    first.accelerator.save_state(str(tmp_path))
    second = Loop(policy="static", depth=2)
    with pytest.raises(ResumeError, match="made with policy static"):
        second.accelerator.load_state(str(tmp_path))
