"""What each rank of ``test_shards.py`` runs: a model that ``fully_shard`` has split, and the same one under DDP.

Start it with ``torchrun --nproc-per-node=2``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import frostline
from frostline.errors import ModelError
from frostline.policies.registry import register
from tests.adapters.hosts import batches, bert
from tests.distributed.traffic import Traffic, Walk

EPOCHS, STEPS = 3, 8
PLAN: dict[str, Any] = {"steps_per_epoch": STEPS, "epochs": EPOCHS, "batch_size": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "walk": {"policy": "walk", "depths": (1, 2, 3, 1, 0, 2, 3)},
    "gradient-norm": {"policy": "gradient-norm", "percentile": 90.0, "evaluations_per_epoch": 4},
    "interlayer": {"policy": "interlayer", "share": 0.5},
    "cached": {"policy": "static", "depth": 2, "cache": "memory"},
}


def _model() -> nn.Module:
    """Its head is registered first, so that only a look at the graph tells it from the stem."""
    model = bert()
    model._modules["bert"] = model._modules.pop("bert")
    return model


def _split(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def _counted(traffic: Traffic) -> Iterator[None]:
    """Count what is handed out for reduction, by whichever name this torch calls it."""
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            traffic.bytes += input.nbytes
            return originals[name](output, input, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def _whole(parameter: Any) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def _digest(model: nn.Module) -> str:
    parts = [_whole(parameter).numpy().tobytes() for _, parameter in sorted(model.named_parameters())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _train(options: dict[str, Any], *, split: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, traffic = _model(), Traffic()
    called = _split(model) if split else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    frost = frostline.Frostline(called, optimizer, **PLAN, **options)
    mine = batches(4)[dist.get_rank() :: 2]
    told: list[dict[str, Any]] = []

    def step(batch: dict[str, torch.Tensor]) -> None:
        model.train()
        still = {n: _whole(p).clone() for n, p in model.named_parameters() if not p.requires_grad}
        active = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
        with _counted(traffic):
            loss = called(**batch).loss
            loss.backward()
        frost.before_step()
        optimizer.step()
        now = dict(model.named_parameters())
        assert all(torch.equal(_whole(now[name]), value) for name, value in still.items()), "a frozen bit moved"
        resting = sorted(frost.freezer.decision.resting)
        told.append({"depth": frost.depth, "active": active, "sent": traffic.taken(), "resting": resting})
        told[-1]["loss"] = float(loss.detach())
        optimizer.zero_grad()
        frost.after_step()

    for _ in range(EPOCHS):
        for batch in mine:
            step(batch)
    model.eval()
    with torch.no_grad():  # leaves gathered copies of the outermost parameters on the modules
        called(**mine[0])
    frost.finish()
    for batch in mine[:3]:
        step(batch)
    return {
        "steps": told,
        "decisions": [{**e, "time": None} for e in frost.log.events if e["event"] == "decision"],
        "owners": {name: str(owner) for name, owner in frost.stack.owners.items()},
        "traced": frost.stack.traced,
        "limits": frost.summary()["limits"],
        "weights": _digest(model),
    }


def _state() -> dict[str, Any]:
    """Stopped in the middle of an interval, and gone on from there."""
    options = OPTIONS["gradient-norm"]
    model = _split(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(model, optimizer, **PLAN, **options)
    for batch in batches(4)[dist.get_rank() :: 2][:3]:
        model(**batch).loss.backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
    saved = frost.state_dict()
    second = frostline.Frostline(_split(_model()), None, **PLAN, **options)
    second.load_state_dict(saved)
    again = second.state_dict()
    shapes = {name: list(parameter.shape) for name, parameter in bert().named_parameters()}
    return {
        "tensors": len(saved["tensors"]),
        "whole": all(list(value.shape) == shapes[name] for name, value in saved["tensors"].items()),
        "same": all(torch.equal(value, again["tensors"][name]) for name, value in saved["tensors"].items()),
        "steps": [saved["state"]["interval_steps"], again["state"]["interval_steps"]],
    }


def _refused() -> str:
    try:
        frostline.Frostline(_split(_model()), None, policy="static", depth=1, memory="safe", **PLAN)
    except ModelError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    register(Walk)
    found: dict[str, Any] = {name: _train(options, split=True) for name, options in OPTIONS.items()}
    found |= {f"{name}-ddp": _train(OPTIONS[name], split=False) for name in ("walk", "gradient-norm")}
    found |= {"state": _state(), "refused": _refused()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
