"""What each rank of ``test_shared.py`` runs: a model under DistributedDataParallel, uncached and cached.

Start it with ``torchrun --nproc-per-node=2``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

from frostline.cache import CacheOptions
from frostline.cache.tiers import tiers_of
from tests.architectures import ARCHITECTURES
from tests.cache.sides import Side

SAMPLES, ROWS = 24, 4
DEPTHS = (1, 1, 3, 3, 2, 2)  # of each epoch


def _train(folder: Path, mode: str) -> dict[str, Any]:
    torch.manual_seed(0)
    bert = next(a for a in ARCHITECTURES if a.name == "bert")
    options = CacheOptions(mode=mode, folder=folder / "records", memory=0 if mode == "disk" else None)
    side = Side(bert, cached=mode != "off", options=options)
    ddp = DistributedDataParallel(side.model, find_unused_parameters=True)
    data = bert.inputs(SAMPLES, seed=7)
    epochs, losses = [], []
    for epoch, depth in enumerate(DEPTHS):
        side.freeze(depth)
        before = side.counts().copy() if side.cache is not None else None
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))[dist.get_rank() :: 2]
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            transformers.set_seed(1000 * epoch + start)
            side.optimizer.zero_grad()
            loss = ddp(**{name: value[rows] for name, value in data.items()}).loss
            loss.backward()
            side.optimizer.step()
            side.clock.step += 1
            losses.append(float(loss.detach()))
        if side.cache is not None and before is not None:
            for tier in tiers_of(side.cache.store):
                tier.cool()
            epochs.append(dict(side.counts() - before))
        dist.barrier()  # so that all that was written is there
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in side.model.parameters())).hexdigest()
    torn = 0
    if side.cache is not None:
        torn = side.cache.store.torn
        side.cache.close()
    named = [{name: epoch.get(name, 0) for name in ("misses", "hits", "upgrades")} for epoch in epochs]
    return {"epochs": named, "losses": losses, "limits": side.limits, "weights": weights, "torn": torn}


def main(folder: Path) -> None:
    """Run with and without the cache, and write what this rank saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {mode: _train(folder, mode) for mode in ("off", "memory", "disk")}
    dist.barrier()
    if dist.get_rank() == 0:
        assert not list((folder / "records").iterdir()), "records were left on disk"
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
