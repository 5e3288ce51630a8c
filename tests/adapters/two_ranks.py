"""What each rank of ``test_two_ranks.py`` runs: Trainers under DistributedDataParallel, one after the other.

Start it with ``torchrun --nproc-per-node=2``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

import frostline
from frostline.errors import ModelError
from frostline.memory import saved
from tests.adapters.hosts import RAMP, Witness, assert_ordinary, batches, bert, trainer_for
from tests.distributed.traffic import Traffic, counted, digest

RATE = 0.05

CASES: dict[str, dict[str, Any]] = {
    "gradient-norm": {"policy": "gradient-norm", "percentile": 100.0, "evaluations_per_epoch": 4},
    "random-blocks": {"policy": "random-blocks", "active": 1, "every": 2},
    "ramp-accumulating": RAMP,
    "ramp-cached": {**RAMP, "cache": "memory"},
    # The decision changes at every step, on every rank alike; what each rank saves is compressed.
    "interlayer": {"policy": "interlayer", "share": 0.5, "line": RAMP, "memory": "slimfit"},
    "interlayer-cached": {"policy": "interlayer", "share": 0.5, "line": RAMP, "memory": "slimfit", "cache": "memory"},
}


def _train(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    accumulate = 2 if "accumulating" in name else 1
    # Plain SGD where the statistic is worked out again by hand, AdamW where only the ranks are compared.
    optimizer: dict[str, Any] = {"optim": "adamw_torch", "weight_decay": 0.1}
    if name == "gradient-norm":
        optimizer = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    model = bert()
    # BERT's loss is a mean over rows; without this the Trainer takes it for a sum over items and adds up the ranks.
    model.accepts_loss_kwargs = False
    trainer = trainer_for(
        folder / name, model, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential", max_grad_norm=0.0, **optimizer,
    )  # fmt: skip
    frost = frostline.attach(trainer, **options)
    witness = Witness()
    trainer.add_callback(witness)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel), "the test shows nothing without DDP"
    assert_ordinary(trainer.model)
    events = [{k: v for k, v in e.items() if k != "time"} for e in frost.log.events if e["event"] == "decision"]
    cache = frost.summary()["cache"] or {"hits": 0, "upgrades": 0}
    return {
        "kept": (frost.summary()["memory"] or {"kept": 0})["kept"],
        "read": cache["hits"] + cache["upgrades"],
        "limits": frost.summary()["limits"],
        "decisions": events,
        "trajectory": frost.summary()["trajectory"],
        "samples": frost.summary()["samples"],
        "frozen": witness.frozen,
        "weights": digest(trainer.model),
    }


def _sent(options: dict[str, Any]) -> list[int]:
    """Bytes of gradients that a plain DDP loop sends at each step, its first two (buckets are rebuilt) left out."""
    model = DistributedDataParallel(bert(), find_unused_parameters=True)
    traffic, sent = Traffic(), []
    model.register_comm_hook(traffic, counted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    frost = frostline.Frostline(model, optimizer, steps_per_epoch=8, epochs=1, **options)
    for batch in batches(8):
        model.train()
        model(**batch).loss.backward()
        frost.before_step()
        optimizer.step()
        optimizer.zero_grad()
        frost.after_step()
        sent.append(traffic.taken())
    frost.finish()
    return sent[2:]


def _refusals(folder: Path) -> list[str]:
    """DDP without find_unused_parameters cannot do without other layers at each step: said before training begins."""
    said = []
    for changes in ({"ddp_find_unused_parameters": False}, {"gradient_checkpointing": True}):
        trainer = trainer_for(folder / "refused", bert(), **changes)
        try:
            frostline.attach(trainer, policy="interlayer")
            trainer.train()
        except ModelError as error:
            said.append(str(error))
    return said


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    saved.SMALL = 2  # the tensors of a tiny model are packed too
    found: dict[str, Any] = {name: _train(folder, name, options) for name, options in CASES.items()}
    found["sent"] = {
        "none": _sent({"policy": "none"}),
        "interlayer": _sent({"policy": "interlayer", "share": 0.9, "memory": "slimfit"}),
    }
    found["refused"] = _refusals(folder)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
