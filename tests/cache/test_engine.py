"""The cache behind the engine: a plain loop, a loop that calls an inner network, Accelerate and Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import frostline
from frostline.events import EventLog
from tests.architectures import ARCHITECTURES, Architecture
from tests.cache.sides import ROWS, SAMPLES, batch_of
from tests.memory.steps import everything_packs

EPOCHS = 3
BY_NAME = {a.name: a for a in ARCHITECTURES}
STATIC: dict[str, Any] = {"policy": "static", "depth": 2}
PLAN: dict[str, Any] = {"steps_per_epoch": SAMPLES // ROWS, "epochs": EPOCHS, "batch_size": ROWS}


def loop(
    architecture: Architecture,
    cache: str,
    wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
    options: dict[str, Any] | None = None,
) -> tuple[list[float], frostline.Summary, nn.Module, EventLog]:
    model = wrap(architecture.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    log = EventLog()
    path = architecture.path and f"{'net.' if isinstance(model, Outer) else ''}{architecture.path}"
    frost = frostline.Frostline(model, optimizer, cache=cache, blocks=path, events=log, **PLAN, **(options or STATIC))
    losses = []
    for epoch in range(EPOCHS):
        for step in range(SAMPLES // ROWS):
            model.train()
            transformers.set_seed(100 * epoch + step)
            run = model.net if isinstance(model, Outer) else model
            loss = run(**batch_of(architecture, [(step + 3 * i + epoch) % SAMPLES for i in range(ROWS)])).loss
            loss.backward()
            frost.before_step()
            optimizer.step()
            optimizer.zero_grad()
            frost.after_step()
            losses.append(float(loss.detach()))
    frost.finish()
    return losses, frost.summary(), model, log


class Outer(nn.Module):
    """Holds the network, but the loop never calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
@pytest.mark.parametrize("wrap", [lambda m: m, Outer], ids=["plain", "inner"])
def test_a_plain_loop(architecture: Architecture, wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected, off, _, _ = loop(architecture, "off", wrap)
    losses, summary, model, log = loop(architecture, "memory", wrap)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert off["cache"] is None
    cache = summary["cache"]
    assert cache["stopped"] is None
    assert cache["hits"] > 0
    assert cache["hits"] + cache["misses"] == EPOCHS * SAMPLES
    checks = [e for e in log.events if e["event"] == "cache" and e["action"] == "check"]
    assert {c["depth"] for c in checks} == {2}
    assert checks[0]["difference"] <= 1e-4
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_with_layers_that_take_turns_and_compression(architecture: Architecture) -> None:
    """The whole house in one run: below the line records, above it layers that rest, and what is saved packed."""
    line = {"policy": "static", "depth": 2}
    options = {"policy": "interlayer", "share": 0.5, "line": line, "memory": "slimfit"}
    with everything_packs():
        expected, off, _, _ = loop(architecture, "off", options=options)
        losses, summary, _, _ = loop(architecture, "memory", options=options)
    # Rounding may carry a value over the border of a code: then gradients differ by more than rounding.
    assert losses[: SAMPLES // ROWS] == pytest.approx(expected[: SAMPLES // ROWS], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert summary["cache"]["hits"] > 0
    assert summary["cache"]["hits"] + summary["cache"]["misses"] == EPOCHS * SAMPLES
    assert 0 < summary["memory"]["kept"] <= off["memory"]["kept"]


def test_accelerate() -> None:
    """Accelerate wraps ``forward`` on the instance; the skip lives inside of that."""
    architecture = BY_NAME["bert"]
    expected, *_ = loop(architecture, "off")

    def prepared(model: nn.Module) -> nn.Module:
        accelerator = Accelerator(cpu=True)
        wrapped: nn.Module = accelerator.prepare_model(model)
        return wrapped

    try:
        losses, summary, *_ = loop(architecture, "memory", prepared)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert summary["cache"]["hits"] > 0


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = BY_NAME["bert"].build()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_lightning() -> None:
    whole = batch_of(BY_NAME["bert"], list(range(SAMPLES)))
    rows = [{name: value[i] for name, value in whole.items()} for i in range(SAMPLES)]
    found = {}
    for cache in ("off", "memory"):
        transformers.set_seed(5)
        module = Module()
        callback = frostline.FrostlineCallback("static", cache, depth=2)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=ROWS, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        found[cache] = module.losses, callback.summary()["cache"]
    assert found["memory"][0] == pytest.approx(found["off"][0], rel=1e-5)
    assert found["memory"][1]["hits"] == 2 * SAMPLES


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_a_compiled_model(name: str) -> None:
    """The skip is part of the graph, which is compiled once for it and not at each step."""
    architecture = BY_NAME[name]
    torch._dynamo.reset()
    plain, ours = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    expected, *_ = loop(architecture, "off", lambda m: torch.compile(m, backend=plain))
    torch._dynamo.reset()
    losses, summary, model, _ = loop(architecture, "memory", lambda m: torch.compile(m, backend=ours))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert summary["cache"]["stopped"] is None
    assert summary["cache"]["hits"] == (EPOCHS - 1) * SAMPLES
    assert 1 <= ours.frame_count <= plain.frame_count + 1
    assert not any("forward" in vars(m) for m in model._orig_mod.modules())


def test_a_compiled_model_that_stays_random_is_not_cached() -> None:
    """Compiled, the dropout that T5's stack has outside of its blocks is not switched off below the frost line."""
    torch._dynamo.reset()
    _, summary, *_ = loop(BY_NAME["t5"], "memory", lambda m: torch.compile(m, backend="eager"))
    assert summary["cache"]["hits"] == 0
    assert "the model draws random numbers" in summary["cache"]["stopped"]


def test_a_model_compiled_in_place_says_that_it_is_not_cached() -> None:
    model = BY_NAME["bert"].build()
    model.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frost = frostline.Frostline(model, optimizer, policy="static", depth=2, cache="memory", **PLAN)
    assert frost.cache is None
    assert any("compiled in place" in limit for limit in frost.summary()["limits"])
    frost.finish()


@pytest.mark.parametrize("sized", [True, False])
def test_without_a_batch_size_steps_are_counted_and_nothing_stops(sized: bool) -> None:
    """An epoch is as many steps, with several rows each; a stream has none, so its samples may always come again."""
    model = BY_NAME["bert"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = {"steps_per_epoch": SAMPLES // ROWS, "epochs": 2} if sized else {"steps_per_epoch": 12, "epochs": 1}
    frost = frostline.Frostline(model, optimizer, policy="static", depth=2, cache="memory", sized=sized, **steps)
    for step in range(6):
        model.train()
        # Two micro-batches a step, of which one never repeats.
        for rows in ([(ROWS * step + i) % SAMPLES for i in range(ROWS)], [0, 1, 2, 3]):
            model(**batch_of(BY_NAME["bert"], rows)).loss.backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
    cache = frost.summary()["cache"]
    assert cache["stopped"] is None
    assert cache["hits"] + cache["misses"] == 12 * ROWS
    assert cache["misses"] == SAMPLES
    frost.finish()


def test_policy_none_installs_nothing() -> None:
    model = BY_NAME["bert"].build()
    frost = frostline.Frostline(model, torch.optim.SGD(model.parameters()), policy="none", cache="memory", **PLAN)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert frost.summary()["cache"] is None


def test_a_model_whose_inputs_are_unknown_is_looked_at_without_the_skip() -> None:
    """The first batch shows what feeds the blocks; a kept cache must not stand in the way of that look."""
    architecture = BY_NAME["plain"]
    owners = []
    for cache in ("off", "memory"):
        model = architecture.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        frost = frostline.Frostline(
            model, optimizer, policy="static", depth=2, cache=cache, blocks=architecture.path, **PLAN
        )
        assert not frost.stack.traced
        model.train()
        model(**batch_of(architecture, [0, 1, 2, 3])).loss.backward()
        assert frost.stack.traced
        owners.append(frost.stack.owners)
        frost.finish()
    assert owners[0] == owners[1]
