"""The step-time benchmark runs, and its bound is that of the same step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.batches import Batch, made_up_batch
from benchmarks.steps import _Visit
from benchmarks.timing import paired_ratio
from benchmarks.truncated import Prefix, Truncated, shared_copy

from benchmarks import step_time, table
from frostline import BlockStack, Frostline, ModelError
from tests.architectures import ARCHITECTURES
from tests.tiny import VOCABULARY

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.fixture
def batch() -> Batch:
    return made_up_batch(VOCABULARY, 4, 8, seed=0, device="cpu")


def small(batch: Batch) -> dict[str, torch.Tensor]:
    """The tiny models have three classes."""
    return {**batch.inputs, "labels": batch.inputs["labels"] % 3}


def test_quick_writes_a_result_and_the_tables_are_made_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "step_time-quick.json"
    assert step_time.main(["--quick", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["packages"]["torch"]
    (measured,) = report["depths"]
    assert [row["depth"] for row in measured["depths"]] == [0, 1, 2, 3]
    for row in measured["depths"]:
        samples = row["samples"]
        below = samples.get("prefix", [0.0] * 3)
        pairs = zip(samples["frostline"], samples["truncated"], below, strict=True)
        assert row["ratio"]["median"] == pytest.approx(statistics.median(f / (t + p) for f, t, p in pairs))
        assert max(row["difference_from_bound"].values()) <= 1e-5
        assert ("prefix" in samples) == (row["depth"] > 0)
    for loop in ("loop", "trainer"):
        low, high = report["none"][loop]["ratio"]["interval"]
        assert report["none"][loop]["contains_one"] == (low <= 1 <= high)
    (statistic,) = report["statistics"]
    blocks = sum(p.numel() for n, p in step_time._tiny(0, "cpu")[0].named_parameters() if ".layer." in n)
    assert statistic["bytes"] == 4 * blocks
    assert statistic["evaluation_seconds"] > 0
    capsys.readouterr()
    table.main([str(out)])
    printed = capsys.readouterr().out
    for expected in ("| depth | Frostline, ms |", "| 3 | ", "| trainer | 3 |", "4 x 8 tokens (made up)"):
        assert expected in printed


def test_it_runs_as_a_script_and_its_help_teaches() -> None:
    script = Path(step_time.__file__)
    found = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "python benchmarks/step_time.py minilm" in found.stdout


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(["nonesuch"]) == 2
    assert "unknown asset 'nonesuch'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_truncated_model_computes_what_the_frozen_one_does_without_a_prefix(
    name: str, depth: int, batch: Batch
) -> None:
    model = BY_NAME[name].build()
    inputs = small(batch)
    stack = BlockStack.find(model)
    truncated, prefix = Truncated(stack, depth, inputs), Prefix(stack, depth)
    assert len(list(truncated.model.get_submodule(stack.path))) == len(stack) - depth  # type: ignore[call-overload]
    frost = Frostline(model, None, policy="static", depth=depth, steps_per_epoch=1, epochs=1)
    truncated.feed(prefix.run(inputs))
    found = []
    for network in (model, truncated.model):
        torch.manual_seed(1)
        loss = network(**inputs).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in truncated.parameters]))
        model.zero_grad(set_to_none=True)
    (loss, gradients), (bound_loss, bound_gradients) = found
    assert torch.equal(loss, bound_loss)
    assert all(a is not None and torch.equal(a, b) for a, b in zip(gradients, bound_gradients, strict=True))
    frost.finish()


def test_a_bound_that_computes_something_else_is_refused(batch: Batch) -> None:
    model, _ = step_time._tiny(0, "cpu")
    stack = BlockStack.find(model)
    visit = _Visit(stack, 2, batch)
    frost = Frostline(model, None, policy="static", depth=2, steps_per_epoch=1, epochs=1)
    assert visit.prefix is not None
    right = visit.prefix.run(batch.inputs)
    visit.truncated.feed(torch.zeros_like(right))
    with pytest.raises(ModelError, match="depth 2: the truncated model computes something else"):
        visit.check(model, seed=0)
    visit.truncated.feed(right)
    visit.check(model, seed=0)
    frost.finish()


def test_copies_share_the_weights() -> None:
    model, _ = step_time._tiny(0, "cpu")
    copy = shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.modules(), copy.modules(), strict=True))


def test_paired_ratio_cancels_what_slows_a_whole_round() -> None:
    slow = [1.0, 5.0, 2.0, 9.0]
    found = paired_ratio([1.1 * s for s in slow], slow, seed=0)
    assert found["median"] == pytest.approx(1.1)
    assert found["interval"] == pytest.approx([1.1, 1.1])
    noisy = paired_ratio([0.9, 1.0, 1.1, 1.2, 0.8], [1.0] * 5, seed=0)
    assert noisy["interval"][0] < 1.0 < noisy["interval"][1]
