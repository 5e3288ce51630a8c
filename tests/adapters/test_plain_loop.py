"""``Frostline`` in a loop written by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import frostline
from frostline.errors import ConfigError, ModelError, ResumeError
from tests.adapters.hosts import RAMP, assert_ordinary, batches, bert, plain_sums
from tests.adapters.loops import PLAN, RATE, decisions, plain, weights
from tests.laws.loops import installed

ONCE: dict[str, Any] = {"policy": "gradient-norm", "evaluations_per_epoch": 1}


def test_end_to_end(tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    model = bert(dropout=0.1)
    _, trained = plain(model, tmp_path, events=log, policy="gradient-norm", percentile=100.0)
    assert_ordinary(model)
    assert all(p.requires_grad for p in model.parameters())
    events = list(frostline.events.read_events(log))
    assert [e["event"] for e in events].count("decision") == 10
    assert events[0]["plan"]["samples_per_epoch"] == 64
    assert any(not torch.equal(value, weights(bert(dropout=0.1))[name]) for name, value in trained.items())


def _scaled(network: nn.Module, scaler: torch.amp.GradScaler) -> frostline.Frostline:
    """One epoch with a gradient scaler and clipping, as torch's documentation writes the loop."""
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    frost = frostline.Frostline(network, optimizer, scaler=scaler, **(PLAN | {"epochs": 1}), **ONCE)
    for batch in batches(8):
        with torch.autocast("cpu", dtype=torch.float16, enabled=scaler.get_scale() > 2.0**20):
            loss = network(**batch).loss
        scaler.scale(loss).backward()
        frost.before_step()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        frost.after_step()
    return frost


def test_statistic_is_unscaled_and_unclipped() -> None:
    expected = plain_sums(bert(), [[b] for b in batches(8)], RATE, clip=1e-3)
    frost = _scaled(bert(), torch.amp.GradScaler("cpu", init_scale=1024.0))
    scores = decisions(frost.log)[0]["observation"]["scores"]
    assert {int(k): v for k, v in scores.items()} == pytest.approx(expected, rel=1e-4)


def test_steps_that_the_scaler_skips_are_left_out() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    seen = decisions(_scaled(bert(), scaler).log)[0]["observation"]
    assert scaler.get_scale() < 2.0**40, "nothing overflowed: the test shows nothing"
    assert 0 < seen["interval_steps"] < 8
    assert all(math.isfinite(score) for score in seen["scores"].values())


def test_a_policy_is_told_the_learning_rate_of_the_step() -> None:
    """Though the loop's schedule has moved on by the time it is asked."""
    model = bert()
    optimizer = torch.optim.SGD([{"params": [p], "lr": RATE} for p in model.parameters()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    frost = frostline.Frostline(model, optimizer, policy="gradient-norm", **PLAN)
    rates = []
    for batch in batches(8):
        rates.append(schedule.get_last_lr()[0])
        model(**batch).loss.backward()
        frost.before_step()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        frost.after_step()
    seen = [decision["observation"] for decision in decisions(frost.log)]
    assert seen
    assert [one["learning_rate"] for one in seen] == [rates[one["step"] - 1] for one in seen]


def test_policy_none_installs_nothing() -> None:
    model = bert(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    before = installed(model, optimizer)
    frost = frostline.Frostline(model, optimizer, policy="none", **PLAN)
    assert installed(model, optimizer) == before
    frost.before_step()
    frost.after_step()
    assert frost.summary()["steps"] == 1
    assert frost.depth == 0


def test_finish_takes_everything_away() -> None:
    model = bert(dropout=0.1)
    model.bert.encoder.layer[1].output.dense.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    before = installed(model, optimizer)
    frost = frostline.Frostline(model, optimizer, policy="static", depth=2, **PLAN)
    assert installed(model, optimizer) != before
    frost.finish()
    frost.finish()
    assert installed(model, optimizer) == before
    assert frost.summary()["final_depth"] == 2
    assert frost.depth == 0


def test_modes_are_put_back_as_they_were() -> None:
    """A user may keep a module in eval mode for the whole run: a batch norm, a dropout."""
    model = bert(dropout=0.1)
    model.bert.embeddings.dropout.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    frost = frostline.Frostline(model, None, policy="static", depth=2, **PLAN)
    frost.finish()
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_state_taken_after_finish() -> None:
    """A checkpoint written at the very end can be trained further: the frost line is where it was."""
    frost = frostline.Frostline(bert(), None, policy="static", depth=2, **PLAN)
    frost.finish()
    again = frostline.Frostline(bert(), None, policy="static", depth=2, **PLAN)
    again.load_state_dict(copy.deepcopy(frost.state_dict()))
    assert again.depth == 2


def test_state_on_disk(tmp_path: Path) -> None:
    first = frostline.Frostline(bert(), None, **PLAN, **RAMP)
    for _ in range(6):
        first.after_step()
    first.save(tmp_path, note="mine")
    second = frostline.Frostline(bert(), None, **PLAN, **RAMP)
    assert second.load(tmp_path)["note"] == "mine"
    assert (second.step, second.samples, second.depth) == (6, 48, 1)
    with pytest.raises(ResumeError, match="another model"):
        frostline.Frostline(bert(num_hidden_layers=5), None, **PLAN, **RAMP).load(tmp_path)
    with pytest.raises(ResumeError, match="no Frostline state"):
        second.load(tmp_path / "nowhere")


@pytest.mark.parametrize("policy", ["ramp", "gradient-norm", "random-blocks"])
def test_decisions_fall_on_equal_numbers_of_samples(policy: str) -> None:
    """Ten steps an epoch, the last of 4 rows instead of 8: the clock is samples, or steps where a policy says so."""
    model = bert()
    plan = {"steps_per_epoch": 10, "epochs": 2, "batch_size": 8, "samples_per_epoch": 76}
    frost = frostline.Frostline(model, torch.optim.SGD(model.parameters(), lr=RATE), policy=policy, **plan)
    for _ in range(20):
        model(**batches(8)[0]).loss.backward()
        frost.before_step()
        model.zero_grad()
        frost.after_step()
    steps = [d["step"] for d in decisions(frost.log)]
    expected = {"ramp": [10, 20], "gradient-norm": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], "random-blocks": [20]}
    assert steps == expected[policy]
    assert frost.samples == 152


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "gradnorm"}, "did you mean 'gradient-norm'"),
        ({"percentile": 101}, "percentile=101"),
        ({"cache": "gpu"}, "unknown cache mode 'gpu'"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0: must be greater than 0"),
        ({"epochs": 0}, "epochs=0"),
        ({"policy": "static", "depth": 4}, "at least one must stay active"),
        ({"blocks": "bert.encoder.layers"}, "did you mean 'bert.encoder.layer'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = bert()
    before = installed(model)
    with pytest.raises((ConfigError, ModelError), match=message):
        frostline.Frostline(model, None, **(PLAN | options))
    assert installed(model) == before


def test_data_parallel() -> None:
    with pytest.raises(ModelError, match="torchrun --nproc-per-node"):
        frostline.Frostline(nn.DataParallel(bert()), None, **PLAN)


class _Network(nn.Module):
    """Takes a tensor under a name that says nothing: its inputs are known when the first batch comes."""

    def __init__(self) -> None:
        super().__init__()
        self.entrance = nn.Linear(8, 8)
        self.cells = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.exit = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        for cell in self.cells:
            x = x + cell(x).relu()
        return self.exit(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_network_whose_inputs_are_unknown(in_place: bool) -> None:
    """The look at the first batch is not compiled: one graph per depth, none for Frostline itself."""
    torch._dynamo.reset()
    network, counter = _Network(), CompileCounterWithBackend("aot_eager")
    if in_place:
        network.compile(backend=counter)
        model: Any = network
    else:
        model = torch.compile(network, backend=counter)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    frost = frostline.Frostline(model, optimizer, **(PLAN | {"epochs": 1}), **RAMP)
    graphs = []
    for _ in range(8):
        model.train()
        model(torch.randn(4, 8)).square().mean().backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
        graphs.append(counter.frame_count)
    assert [m["step"] for m in frost.summary()["trajectory"]] == [4, 6, 8]
    assert graphs == [1, 1, 1, 1, 2, 2, 3, 3]
    assert any("compiled in place" in limit for limit in frost.summary()["limits"]) == in_place


def test_compiling_in_place_does_not_compile_the_look_at_a_model() -> None:
    """Where inputs can be made up, the stack is found in one pass of its own: it must not count as a graph."""
    torch._dynamo.reset()
    model, counter = bert(num_hidden_layers=2), CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    frost = frostline.Frostline(model, None, policy="static", depth=1, **PLAN)
    assert frost.stack.traced
    assert counter.frame_count == 0


def test_after_resuming_with_larger_batches_a_gradient_counts_as_its_batch_is_large() -> None:
    model = bert()
    model(**batches(8)[0]).loss.backward()

    def norms(batch_size: int, saved: dict[str, Any] | None = None) -> tuple[dict[int, float], dict[str, Any]]:
        frost = frostline.Frostline(
            model, torch.optim.SGD(model.parameters(), lr=RATE), steps_per_epoch=8, epochs=2, batch_size=batch_size,
            **ONCE,
        )  # fmt: skip
        if saved is not None:
            frost.load_state_dict(saved)
        frost.before_step()
        frost.after_step()
        state = copy.deepcopy(frost.state_dict())
        assert frost._statistics is not None
        return frost._statistics.observed()["scores"], state

    once, saved = norms(8)
    same, _ = norms(8, saved)
    larger, _ = norms(24, saved)
    for block, norm in once.items():
        assert same[block] == pytest.approx(2 * norm, rel=1e-5)
        assert larger[block] == pytest.approx((1 + 3) * norm, rel=1e-5)
