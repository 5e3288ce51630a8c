"""What each rank of ``test_upkeep.py`` runs: plain loops under DistributedDataParallel, one after the other.

Start it with ``torchrun``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import frostline
from frostline.errors import ModelError
from frostline.policies.registry import register
from tests.adapters.hosts import Rows, batches, bert
from tests.distributed.traffic import Traffic, Walk, active_bytes, counted, digest

EPOCHS, STEPS = 3, 8
# Asked every 3 steps: every depth, a thaw in between, and the end at depth 3.
WALK: dict[str, Any] = {"policy": "walk", "depths": (1, 2, 3, 1, 0, 2, 3)}
STAY: dict[str, Any] = {"policy": "walk", "depths": (1, 1, 1, 2, 2, 2, 2)}
LISA: dict[str, Any] = {"policy": "random-blocks", "active": 1, "every": 2}

# ``seen``: whether the engine sees the wrapper; without, it freezes in place, as any loop of one's own would.
CASES: dict[str, dict[str, Any]] = {
    "walk": {},
    "walk-unused": {"find_unused_parameters": True},
    "walk-in-place": {"find_unused_parameters": True, "seen": False},
    "accumulated": {"accumulate": 2},
    "accumulated-in-place": {"accumulate": 2, "find_unused_parameters": True, "seen": False},
    "compressed": {"hook": "fp16"},
    "compressed-in-place": {"hook": "fp16", "find_unused_parameters": True, "seen": False},
    "power": {"hook": "power"},
    "views": {"gradient_as_bucket_view": True, "set_to_none": False},
    "small-buckets": {"bucket_cap_mb": 0.02},
    "stay": {"options": STAY},
    "cached": {"options": STAY, "cache": "memory"},
    "random": {"options": LISA},
    "random-unused": {"options": LISA, "find_unused_parameters": True},
    "restless": {"options": {"policy": "interlayer", "share": 0.5, "within": "model"}, "find_unused_parameters": True},
    "split": {"options": {"policy": "gradient-norm", "percentile": 90.0, "evaluations_per_epoch": 4}, "noise": True},
}
OF_FOUR = ("walk", "walk-in-place", "random", "split")


def _train(
    *,
    options: dict[str, Any] = WALK,
    seen: bool = True,
    accumulate: int = 1,
    hook: str = "count",
    set_to_none: bool = True,
    noise: bool = False,
    cache: str = "off",
    **settings: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, traffic = bert(), Traffic()
    ddp = DistributedDataParallel(model, **settings)
    power = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
    state, function = {
        "count": (traffic, counted), "fp16": (None, fp16_compress_hook), "power": (power, powerSGD_hook),
    }[hook]  # fmt: skip
    ddp.register_comm_hook(state, function)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    frost = frostline.Frostline(
        ddp if seen else model, optimizer, steps_per_epoch=STEPS, epochs=EPOCHS, batch_size=8, cache=cache, **options
    )
    if noise and dist.get_rank() > 0:
        _disturb(frost)
    ranks = dist.get_world_size()
    mine = batches(8 // ranks // accumulate)[dist.get_rank() :: ranks]
    told: list[dict[str, Any]] = []

    def step(micro: list[dict[str, Tensor]]) -> None:
        model.train()
        active, losses = active_bytes(model), []
        for number, batch in enumerate(micro):
            with ddp.no_sync() if number + 1 < len(micro) else nullcontext():
                loss = ddp(**batch).loss
                (loss / len(micro)).backward()
                losses.append(float(loss.detach()))
        frost.before_step()
        optimizer.step()
        told.append({"depth": frost.depth, "active": active, "sent": traffic.taken(), "losses": losses})
        optimizer.zero_grad(set_to_none=set_to_none)
        frost.after_step()

    for _ in range(EPOCHS):
        for first in range(0, len(mine), accumulate):
            step(mine[first : first + accumulate])
    frost.finish()
    for first in range(3):
        step(mine[first : first + accumulate])
    summary = frost.summary()
    return {
        "steps": told,
        "decisions": [{**e, "time": None} for e in frost.log.events if e["event"] == "decision"],
        "limits": summary["limits"],
        "cache": {k: summary["cache"][k] for k in ("hits", "upgrades")} if summary["cache"] else None,
        "compressed": power.total_numel_after_compression,
        "weights": digest(model),
    }


def _shared() -> dict[str, Any]:
    """Ranks that share batches of 16, and one rank that has them whole: by itself, and taught the ranks' weights."""
    rows = Rows(16 * STEPS)
    ranks = dist.get_world_size()
    together, weights = _learn(batches(16 // ranks, rows)[dist.get_rank() :: ranks], wrapped=True)
    whole = batches(16, rows)
    alone, _ = _learn(whole, wrapped=False)
    taught, _ = _learn(whole, wrapped=False, weights=weights)
    return {"together": together, "alone": alone, "taught": taught}


def _learn(
    mine: list[dict[str, Tensor]], *, wrapped: bool, weights: list[list[Tensor]] | None = None
) -> tuple[dict[str, Any], list[list[Tensor]]]:
    """Training in steps of 16 samples, and the weights before each; with ``weights`` every step begins with those."""
    torch.manual_seed(0)
    model = bert()
    called = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    frost = frostline.Frostline(
        called, optimizer, policy="gradient-norm", percentile=50.0, evaluations_per_epoch=4, steps_per_epoch=STEPS,
        epochs=EPOCHS, batch_size=16,
    )  # fmt: skip
    before: list[list[Tensor]] = []
    losses, depths = [], []
    for number in range(EPOCHS * STEPS):
        if weights is not None:
            for parameter, weight in zip(model.parameters(), weights[number], strict=True):
                parameter.data.copy_(weight)
        before.append([parameter.detach().clone() for parameter in model.parameters()])
        model.train()
        loss = called(**mine[number % STEPS]).loss
        loss.backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        depths.append(frost.depth)
        frost.after_step()
    scores = [e["observation"]["scores"] for e in frost.log.events if e["event"] == "decision"]
    frost.finish()
    return {"losses": losses, "depths": depths, "scores": scores}, before


def _disturb(frost: frostline.Frostline) -> None:
    """Let this rank measure otherwise than the first, far more than rounding would."""
    measured = frost._statistics.observed
    generator = torch.Generator().manual_seed(dist.get_rank())

    def observed() -> dict[str, Any]:
        numbers = measured()
        noise = torch.rand(len(numbers["scores"]), generator=generator).tolist()
        scores = {block: score * (1 + n) for (block, score), n in zip(numbers["scores"].items(), noise, strict=True)}
        return {**numbers, "scores": scores}

    frost._statistics.observed = observed


class Misleading(nn.Module):
    """Its inputs cannot be made up, and its head is registered first: taken for the stem until a real batch shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).square().mean()


def _late() -> dict[str, Any]:
    """The frozen set changes in the middle of the first forward pass of the wrapper."""
    model, traffic = Misleading(), Traffic()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(traffic, counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(ddp, optimizer, policy="static", depth=2, steps_per_epoch=4, epochs=1)
    before = frost.stack.owners["last.weight"]
    generator = torch.Generator().manual_seed(dist.get_rank())
    told = []
    for _ in range(4):
        model.train()
        ddp(torch.randn(4, 8, generator=generator)).backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
        told.append({"active": active_bytes(model), "sent": traffic.taken()})
    return {"owners": [before, frost.stack.owners["last.weight"]], "steps": told, "weights": digest(model)}


def _interrupted() -> dict[str, Any]:
    """A backward pass that ends in an error leaves a reducer waiting; what comes after it must not."""
    torch.manual_seed(0)
    model, traffic = bert(), Traffic()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(traffic, counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(ddp, optimizer, policy="static", depth=2, steps_per_epoch=4, epochs=1)
    mine = batches(4)[dist.get_rank() :: 2]

    def step(batch: dict[str, Tensor]) -> int:
        model.train()
        ddp(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return traffic.taken()

    sent = [step(batch) for batch in mine[:3]]

    def fail(_: Tensor) -> None:
        raise InterruptedError

    handle = model.bert.encoder.layer[2].output.dense.weight.register_hook(fail)
    try:
        step(mine[3])
    except InterruptedError:
        frost.finish()
    handle.remove()
    optimizer.zero_grad()
    traffic.taken()
    sent += [step(batch) for batch in mine[4:7]]
    return {"sent": sent, "all": active_bytes(model), "weights": digest(model)}


def _refused() -> list[str]:
    said = []
    for settings, options in (
        ({"static_graph": True}, WALK),
        ({}, {"policy": "interlayer"}),
        ({}, {"policy": "random-blocks", "every": 1}),
    ):
        ddp = DistributedDataParallel(bert(), **settings)
        try:
            frostline.Frostline(ddp, None, steps_per_epoch=1, epochs=1, **options)
        except ModelError as error:
            said.append(str(error))
    return said


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    register(Walk)
    names = CASES if dist.get_world_size() == 2 else OF_FOUR
    found: dict[str, Any] = {name: _train(**CASES[name]) for name in names}
    found["shared"] = _shared()
    if dist.get_world_size() == 2:
        found |= {"late": _late(), "interrupted": _interrupted(), "refused": _refused()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
