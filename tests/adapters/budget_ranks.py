"""What each rank of ``test_budget_ranks.py`` runs: Trainers with a memory budget under DistributedDataParallel.

Start it with ``torchrun --nproc-per-node=2``; every rank writes ``rank<n>.json`` into the folder it is given.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import frostline
from frostline.adapters import fitting
from frostline.adapters.randomness import capture
from frostline.errors import FrostlineError
from frostline.memory import LiveBytes, saved
from frostline.memory.planner import Considered, MemoryPlan
from tests.adapters.hosts import Rows, batches, bert, collate, trainer_for
from tests.distributed.traffic import digest
from tests.memory.steps import run

ROOMY = 10**12
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "gradient-norm": {"policy": "gradient-norm", "initial_depth": 1},
    "random-blocks": {"policy": "random-blocks", "active": 1, "every": 2},
    "interlayer": {"policy": "interlayer", "share": "auto"},
}
# The wrapper is built before anything is frozen: for a line so deep that takes more than any step. Of a model that is
# mostly born frozen it sends the weights round all the same.
AS_THEY_ARE: dict[str, dict[str, Any]] = {
    "deep": {"policy": "static", "depth": 3},
    "born-frozen": {"policy": "none", "born": 60},
    "accumulating": {"policy": "none", "gradient_accumulation_steps": 2},
}
SETTINGS = ("max_steps", "save_steps", "save_strategy", "gradient_accumulation_steps")


class Random(Rows):
    """Rows that draw from every generator when they are looked at."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random.random()
        np.random.rand()
        torch.rand(())
        return super().__getitem__(index)


def _train(folder: Path, budget: int, *, resume: bool = False, born: int = 0, **options: Any) -> dict[str, Any]:
    """A run, the plan for it and the most bytes that were alive at any moment of it."""
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    model = bert(hidden_size=128, intermediate_size=256)
    for parameter in list(model.parameters())[:born]:
        parameter.requires_grad_(False)
    trainer = trainer_for(folder, model, rows=Rows(48, length=16), **settings)
    frost = frostline.attach(trainer, memory={"budget": budget}, **options)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        trainer.train(resume_from_checkpoint=resume or None)
    plan = [event for event in frost.log.events if event["event"] == "memory"][-1]
    return {
        "plan": {name: plan[name] for name in MemoryPlan.from_numbers(frost.summary()["memory"]["plan"]).numbers()},
        "peak": live.peak,
        "weights": digest(model),
    }


def _fitted(folder: Path, **options: Any) -> dict[str, Any]:
    """The run as it is, and in less than it takes."""
    roomy = _train(folder / "roomy", ROOMY, **options)
    return {"roomy": roomy, "tight": _train(folder / "tight", int(0.96 * roomy["plan"]["peak"]), **options)}


def _resumed(folder: Path, budget: int) -> dict[str, Any]:
    settings = {"policy": "none", "save_strategy": "steps", "save_steps": 2}
    before = _train(folder, budget, max_steps=2, **settings)
    return {"before": before, "after": _train(folder, budget, max_steps=4, resume=True, **settings)}


def _again(folder: Path) -> dict[str, Any]:
    """The second run of a Trainer: planned on a model around which there is a wrapper already."""
    model = bert(hidden_size=128, intermediate_size=256)
    trainer = trainer_for(folder, model, rows=Rows(48, length=16))
    frost = frostline.attach(trainer, "interlayer", share=0.5, memory={"budget": ROOMY})
    trainer.train()
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    with LiveBytes([*model.parameters(), *model.buffers(), *state]) as live:
        trainer.train()
    return {"plan": frost.summary()["memory"]["plan"], "peak": live.peak}


def _split(folder: Path, steps: int) -> list[float]:
    """All weights after a run with plain SGD in ``steps`` micro-batches, which shows every factor in a gradient."""
    trainer = trainer_for(folder, bert(), optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    rows = trainer.args.per_device_train_batch_size // steps
    plan = MemoryPlan(ROOMY, rows, steps, "off", False, 1, 1, (Considered("off", False, rows, 1, 1.0),))
    frostline.attach(trainer, "none", memory={"budget": ROOMY})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "plan_memory", lambda *_, **__: plan)
        trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).tolist()


def _random(folder: Path) -> dict[str, Any]:
    """The random state before and after planning, on data that draw."""
    trainer = trainer_for(folder, bert(), rows=Random())
    random.seed(int(os.environ["RANK"]))
    frost = frostline.attach(trainer, "none", memory={"budget": ROOMY})
    before = capture()
    with frost._fitting.run(None):
        return {"same": capture() == before}


def _refused(folder: Path) -> dict[str, list[str]]:
    """What each rank raises where the first one cannot plan."""

    def breaks(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        raise KeyError("labels")

    said = {}
    for name, budget, collator in (("least", 1000, collate), ("broken", ROOMY, breaks)):
        trainer = trainer_for(folder / name, bert())
        trainer.data_collator = collator
        frostline.attach(trainer, "none", memory={"budget": budget})
        try:
            trainer.train()
        except (FrostlineError, KeyError) as error:
            said[name] = [type(error).__name__, str(error)]
    return said


def main(folder: Path) -> None:
    """Run every case and write what this rank saw."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    saved.SMALL = 2  # the tensors of a tiny model are packed too
    # Each process makes the table of a code book once, for a moment in more bytes than the tiny model has.
    run(bert(), batches(2)[0], "slimfit")
    found: dict[str, Any] = {name: _fitted(folder / name, **options) for name, options in POLICIES.items()}
    found |= {name: _train(folder / name, ROOMY, **options) for name, options in AS_THEY_ARE.items()}
    found["again"] = _again(folder / "again")
    found["resumed"] = _resumed(folder / "resumed", found["none"]["tight"]["plan"]["budget"])
    found["split"] = [_split(folder / f"split{steps}", steps) for steps in (1, 4)]
    found["random"] = _random(folder / "random")
    found["refused"] = _refused(folder / "refused")
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
