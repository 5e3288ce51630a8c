"""Records in the memory of a GPU, of the host and on disk, while a model trains on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import frostline
from tests.architectures import ARCHITECTURES, Architecture
from tests.cache.sides import ROWS, SAMPLES, batch_of, calls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPOCHS = 3
TIERS: dict[str, dict[str, Any]] = {
    "device": {"mode": "memory", "device": "64MB", "memory": 0},
    "memory": {"mode": "memory"},
    "disk": {"mode": "disk", "memory": 0},
}
NAMES = ("bert", "mpnet", "gpt2", "llama-classes", "vit", "resnet", "t5")


def train(
    architecture: Architecture, cache: Any, *, bf16: bool = False
) -> tuple[list[float], frostline.Summary, dict[int, int]]:
    torch.manual_seed(0)
    model = architecture.build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    frost = frostline.Frostline(
        model, optimizer, policy="static", depth=2, cache=cache, blocks=architecture.path, batch_size=ROWS,
        steps_per_epoch=SAMPLES // ROWS, epochs=EPOCHS,
    )  # fmt: skip
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    losses = []

    def batches() -> Any:
        for epoch in range(EPOCHS):
            for step in range(SAMPLES // ROWS):
                rows = [(step + 3 * i + epoch) % SAMPLES for i in range(ROWS)]
                yield {name: value.cuda() for name, value in batch_of(architecture, rows).items()}

    seen: dict[int, int] = {}
    for number, batch in enumerate(frost.loader(batches())):
        model.train()
        transformers.set_seed(number)
        with calls(frost.stack) as ran, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        if number >= 2 * SAMPLES // ROWS:
            seen = dict(ran)
        loss.backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
        losses.append(float(loss.detach()))
    frost.finish()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    return losses, frost.summary(), seen


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cached_run_is_the_uncached_one(name: str, tier: str, tmp_path: Path) -> None:
    (architecture,) = [a for a in ARCHITECTURES if a.name == name]
    expected, _, _ = train(architecture, "off")
    given = TIERS[tier] | ({"folder": str(tmp_path)} if tier == "disk" else {})
    losses, summary, ran = train(architecture, given)
    assert losses == pytest.approx(expected, rel=1e-5)
    cache = summary["cache"]
    assert cache["stopped"] is None
    assert cache["hits"] >= SAMPLES
    assert ran.get(0, 0) == ran.get(1, 0) == 0, f"skipped blocks ran: {ran}"


@pytest.mark.parametrize("tier", ["device", "memory"])
def test_under_autocast(tier: str) -> None:
    (architecture,) = [a for a in ARCHITECTURES if a.name == "bert"]
    expected, _, _ = train(architecture, "off", bf16=True)
    losses, summary, _ = train(architecture, TIERS[tier], bf16=True)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert summary["cache"]["hits"] >= SAMPLES
