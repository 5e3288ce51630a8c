"""The launcher's worker, which tells what it trains on and dies where it is told to.

``FROSTLINE_WITNESS`` is a folder. Each rank appends to ``rows-<rank>.jsonl`` what it has trained on. ``kills.json``
holds a list of points, ``{"at": ..., "rank": ...}``; each kills that rank once: a number of samples (after the step
that reaches it), ``claimed`` (the run has its directory, but no list of stages yet), ``look`` (the next stage has been
chosen, nothing is saved yet), ``saved`` (the checkpoint is there, the next stage is not), ``carried`` (its checkpoint
is there too, but the list of stages does not know it) or ``listed`` (it does, and the old stage has not quite ended).
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import frostline.adapters.staging as staging
from frostline.adapters.recorder import Recorder
from frostline.launcher import worker

FOLDER, RANK = Path(os.environ["FROSTLINE_WITNESS"]), int(os.environ["RANK"])


def die_at(point: int | str) -> None:
    kills = FOLDER / "kills.json"
    for number, kill in enumerate(json.loads(kills.read_text()) if kills.exists() else []):
        fired = FOLDER / f"killed-{number}"
        if kill == {"at": point, "rank": RANK} and not fired.exists():
            fired.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    counted, carry, found, moved = Recorder.on_step_end, staging.carry, staging.Keeper._find, staging.move_on

    def on_step_end(self: Recorder, *args: Any, **kwargs: Any) -> None:
        counted(self, *args, **kwargs)
        die_at(self.samples)

    def carried(*args: Any) -> Path:
        target = carry(*args)
        die_at("carried")
        return target

    def look(self: staging.Keeper, *args: Any) -> Any:
        self._stages.write = lambda run: (type(self._stages).write(self._stages, run), die_at("look"))  # type: ignore
        return found(self, *args)

    def move_on(*args: Any) -> None:
        die_at("saved")
        moved(*args)

    # What the Trainer trains on, at the place where its loader is made.
    def ordered_loader(trainer: Any, order: Any) -> Any:
        step = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = [[token for token in row if token] for row in inputs["input_ids"].tolist()]
            with (FOLDER / f"rows-{RANK}.jsonl").open("a") as file:
                batch = order._stage.batch
                file.write(json.dumps({"step": trainer.state.global_step, "batch": batch, "rows": rows}) + "\n")
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        return loader(trainer, order)

    import frostline.recipes.runner as runner
    import frostline.recipes.staged as staged

    loader, start = runner.ordered_loader, runner.RunDirectory.start

    def claimed(*args: Any) -> None:
        start(*args)
        die_at("claimed")

    runner.RunDirectory.start = claimed  # type: ignore
    Recorder.on_step_end, staging.carry, staging.Keeper._find = on_step_end, carried, look  # type: ignore
    stays = worker._stays

    def _stays(*args: Any) -> bool:
        die_at("listed")
        return stays(*args)

    worker._stays = _stays
    staged.move_on, runner.ordered_loader = move_on, ordered_loader  # type: ignore
    worker.main()


if __name__ == "__main__":
    main()
