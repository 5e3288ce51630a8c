"""What the one rank of ``test_nccl.py`` runs: loops on a GPU, whose gradients travel by NCCL.

It is a group of its own, and writes ``rank0.json`` into the folder it is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import frostline
from frostline.policies.registry import register
from tests.adapters.hosts import batches, bert
from tests.distributed.traffic import Traffic, Walk, active_bytes, counted

EPOCHS, STEPS = 3, 8
WALK: dict[str, Any] = {"policy": "walk", "depths": (1, 2, 3, 1, 0, 2, 3)}
CASES: dict[str, dict[str, Any]] = {
    "gradient-norm": {"policy": "gradient-norm", "percentile": 75, "evaluations_per_epoch": 4},
    "walk": WALK,
    "cached": {"policy": "static", "depth": 2, "cache": "memory"},
    "compressed": {"policy": "static", "depth": 1, "memory": "slimfit"},
}


def train(options: dict[str, Any], *, wrapped: bool) -> dict[str, Any]:
    """Losses, bytes that were sent and that what trains has, and the trajectory of a loop."""
    torch.manual_seed(0)
    model: nn.Module = bert().cuda()
    traffic = Traffic()
    if wrapped:
        model = DistributedDataParallel(model, device_ids=[0])
        model.register_comm_hook(traffic, counted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    frost = frostline.Frostline(model, optimizer, steps_per_epoch=STEPS, epochs=EPOCHS, batch_size=8, **options)
    losses, sent, active = [], [], []
    for epoch in range(EPOCHS):
        for number, batch in enumerate(batches(8)):
            model.train()
            transformers.set_seed(100 * epoch + number)
            active.append(active_bytes(model))
            loss = model(**{name: value.cuda() for name, value in batch.items()}).loss
            loss.backward()
            sent.append(traffic.taken())
            frost.before_step()
            optimizer.step()
            optimizer.zero_grad()
            frost.after_step()
            losses.append(float(loss.detach()))
    frost.finish()
    summary = frost.summary()
    return {
        "losses": losses,
        "sent": sent,
        "active": active,
        "trajectory": summary["trajectory"],
        "hits": summary["cache"]["hits"] if summary["cache"] else None,
        "limits": summary["limits"],
    }


def main(folder: Path) -> None:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    register(Walk)
    found = {
        name: {"wrapped": train(options, wrapped=True), "plain": train(options, wrapped=False)}
        for name, options in CASES.items()
    }
    (folder / "rank0.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
