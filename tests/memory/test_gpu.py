"""Compression and the memory model on a GPU: kernels do what the formats do, and peaks are what the allocator says."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from frostline import BlockStack
from frostline.adapters.huggingface import attach
from frostline.freezer import Freezer
from frostline.memory import Bench, MemoryModel, Way, compressing, kernels, optimizer_cost
from frostline.memory.codebook import FUNCTIONS, CodeBook
from frostline.memory.formats import Bits, Format, Noise, Packed, Rows
from frostline.policies.base import Decision
from tests.memory.steps import cosine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = [Rows(8), Rows(4), Rows(8, False), Bits(), Noise(), *map(CodeBook, FUNCTIONS)]
# What a model must be for the allocator's rounding and cuBLAS' workspace to weigh little: BERT-base's shape.
ROWS, LENGTH = 32, 128


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**changes)).cuda()


def batch(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 30_000, (rows, LENGTH), generator=generator)
    host = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    return {name: value.cuda() for name, value in host.items()}


# -- kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 127, 129, 4112, 5000, 128 * 2048, 128 * 2048 + 77])
@pytest.mark.parametrize("how", FORMATS, ids=repr)
def test_a_kernel_does_what_the_host_does(how: Format, count: int, dtype: torch.dtype) -> None:
    values = (3 * torch.randn(count)).to(dtype)
    if isinstance(how, (Bits, Noise)):
        values = (values > 0).to(dtype) * 1.25
    if how == Rows(8, False):
        values = values.abs()
    there = values.cuda()
    assert kernels.usable(there), "the kernels are switched off: the test shows nothing"
    host, device = Packed(how, values), Packed(how, there)
    for one, other in zip(host.parts, device.parts, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        # Rounding may fall the other way where a value is half-way between two codes, which in half precision many are.
        assert (one != other.cpu()).float().mean() <= 0.01 or count < 1000
    step = values.float().abs().max() / (7 if how == Rows(4) else 127)
    apart = 0.1 if isinstance(how, CodeBook) else 1.01 * step  # of a level, where rounding took the next one
    assert (host.restore().float() - device.restore().cpu().float()).abs().max() <= apart
    assert torch.equal(there.cpu(), values), "packing changed what it was given"
    assert torch.equal(device.restore(), device.restore())


def test_booleans_come_back_as_they_were() -> None:
    values = torch.rand(100_003, device="cuda") < 0.3
    assert torch.equal(Packed(Bits(), values).restore(), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_are_not_finite(bits: int) -> None:
    values = torch.ones(4, 128, device="cuda")
    values[1], values[2, 5], values[3, 5] = 0, torch.inf, torch.nan
    back = Packed(Rows(bits), values.view(-1)).restore().view(4, 128)
    assert torch.allclose(back[0], torch.ones_like(back[0]), atol=0.01)
    assert (back[1] == 0).all()
    assert not back[2:].isfinite().any()


def test_values_that_lie_anywhere() -> None:
    values = torch.randn(1000, device="cuda")[3:]
    assert torch.allclose(Packed(Rows(8), values).restore(), values, atol=0.02)


# -- compression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("level", "near"), [("safe", 0.999), ("slimfit", 0.99), ("max", 0.97)])
def test_loss_is_exact_and_gradients_are_near(level: str, near: float, attention: str, autocast: bool) -> None:
    model, inputs = bert(num_hidden_layers=4, attn_implementation=attention).train(), batch(8)
    found = []
    for of in ("off", level):
        model.zero_grad(set_to_none=True)
        transformers.set_seed(3)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), compressing(model, of):
            loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert cosine(found[1][1], found[0][1]) >= near


# -- the memory model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 6, 11])
@pytest.mark.parametrize("way", [Way(), Way("slimfit"), Way(checkpointing=True)], ids=str)
def test_the_predicted_peak_is_the_allocators(way: Way, depth: int) -> None:
    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, fused=True)

    gc.collect()
    before = torch.cuda.memory_allocated()  # of tests that have failed
    torch._C._cuda_clearCublasWorkspaces()
    stack = BlockStack.find(bert())
    bench = Bench(stack, batch, lambda inputs: stack.model(**inputs).loss)
    cost = optimizer_cost(adamw, stack.parameters_of(11)["bert.encoder.layer.11.intermediate.dense.weight"])
    predicted = MemoryModel.measure(bench, [way], cost).peak(way, ROWS, depth)
    Freezer(stack).apply(Decision(depth))
    optimizer = adamw([p for p in stack.model.parameters() if p.requires_grad])
    inputs = batch(ROWS)
    with bench.ready(way):
        for _ in range(2):
            stack.model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            loss = bench.forward(way, inputs)
            loss.backward()
            optimizer.step()
            del loss
    measured = torch.cuda.max_memory_allocated() - before
    print(f"\npeak {way}, depth {depth}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, "
          f"{predicted / measured - 1:+.2%}")  # fmt: skip
    assert predicted == pytest.approx(measured, rel=0.05)


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30_000, (rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(LENGTH).long(), "labels": index % 2}


@pytest.mark.parametrize("options", [{"policy": "none"}, {"policy": "interlayer", "share": "auto"}], ids=str)
def test_a_run_keeps_its_budget(options: dict[str, Any], tmp_path: Path) -> None:
    """The device is made as small as the budget: a micro-batch too large would run out of memory."""

    def trainer(folder: str) -> transformers.Trainer:
        args = transformers.TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=ROWS, max_steps=12, report_to="none",
            save_strategy="no", optim="adamw_torch_fused", learning_rate=1e-4, disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(bert(), args, train_dataset=Texts(512))

    gc.collect()
    plain = trainer("plain")
    plain.train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plain.train()
    before = torch.cuda.max_memory_allocated()
    del plain
    gc.collect()
    budget = int(0.6 * before)
    fitted = trainer("fitted")
    frost = attach(fitted, memory={"budget": budget}, **options)
    torch.cuda.empty_cache()
    # What the allocator holds in reserve between blocks is no memory of the run's.
    torch.cuda.set_per_process_memory_fraction(1.15 * budget / torch.cuda.get_device_properties(0).total_memory)
    try:
        torch.cuda.reset_peak_memory_stats()
        fitted.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    plan = frost.summary()["memory"]["plan"]
    measured = torch.cuda.max_memory_allocated()
    print(f"\n{options}: plain {before / 1e6:.0f} MB, budget {budget / 1e6:.0f}, plan {plan['peak'] / 1e6:.0f}, "
          f"measured {measured / 1e6:.0f}: {frost.summary()['memory']}")  # fmt: skip
    assert frost.summary()["steps"] == 12
    assert measured <= budget
