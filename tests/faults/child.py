"""One training run in a process of its own, that can be killed anywhere and started again.

Started as a script (``python -m tests.faults.child``) it imports torch and the Trainer once, then reads one JSON
order a line from standard input, forks a process that carries it out, and answers with how that process ended:

    {"folder": ..., "variant": "length-grouped", "point": "step:17", "seconds": null, "sabotage": null}
    {"status": -9, "seconds": 1.37}

A run that finds checkpoints in its folder resumes. What it leaves is in ``folder/result``: see :func:`write_result`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import frostline.adapters.huggingface as huggingface
import frostline.engine
import frostline.state
from frostline.errors import ResumeError
from frostline.events import read_events
from frostline.freezer import Freezer
from frostline.policies.base import Decision
from frostline.statistics import GradientSum

ROWS, TEST_ROWS, VOCABULARY, LABELS = 236, 48, 64, 3
STEPS_PER_EPOCH = 15  # 30 batches of 8 (the last one smaller), two to a step

# Each meets the host where it is weakest: an order that is drawn anew each epoch, an evaluation that comes after the
# checkpoint of an epoch's last step, a logging interval that a checkpoint cuts in two; a run that ends inside an epoch.
VARIANTS: dict[str, dict[str, Any]] = {
    "length-grouped": {
        "train_sampling_strategy": "group_by_length",
        "num_train_epochs": 3,
        "save_steps": 5,
        "eval_strategy": "epoch",
    },
    "best-model": {
        "max_steps": 2 * STEPS_PER_EPOCH + 7,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    },
}
# The same run with its boundary activations on disk, where a later run may find them.
CACHED = {"cached": "length-grouped"}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Token ids of 4 to 24 tokens; the label can be learned from them."""
    draw = random.Random(seed)
    data = []
    for _ in range(count):
        label = draw.randrange(LABELS)
        ids = [draw.randrange(3 + 20 * label, 23 + 20 * label) for _ in range(draw.randint(4, 24))]
        data.append({"input_ids": ids, "labels": label if draw.random() < 0.8 else draw.randrange(LABELS)})
    return data


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest row."""
    length = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in batch])
    labels = torch.tensor([row["labels"] for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def build_model() -> BertForSequenceClassification:
    """Four blocks of width 32, dropout on."""
    torch.manual_seed(7)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, num_labels=LABELS,
        )
    )  # fmt: skip


def build_trainer(folder: Path, variant: str, **changes: Any) -> Trainer:
    """A Trainer with accumulation, clipping, evaluation, checkpoints in mid-epoch and their rotation."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **VARIANTS[CACHED.get(variant, variant)],
        **changes,
    }
    return Trainer(
        build_model(),
        TrainingArguments(str(folder / "checkpoints"), **settings),
        data_collator=collate,
        train_dataset=rows(ROWS, 1),
        eval_dataset=rows(TEST_ROWS, 2),
    )


def run(folder: Path, variant: str, point: str | None = None, sabotage: str | None = None) -> None:
    """Train in ``folder``, from the newest checkpoint there if there is one; killed at ``point`` on the way."""
    if sabotage is not None:
        SABOTAGES[sabotage]()
    trainer = build_trainer(folder, variant)
    events = folder / "events.jsonl"
    if point is not None:
        aim(trainer, point)
    disk = {"mode": "disk", "memory": 0, "folder": folder / "cache", "keep": True}
    cache = disk if variant in CACHED else "off"
    frost = huggingface.attach(trainer, "gradient-norm", cache, percentile=75, events=events)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ResumeError:
        events.unlink(missing_ok=True)
        trainer.train()
    write_result(folder / "result", trainer, dict(frost.summary()), events)


def write_result(target: Path, trainer: Trainer, summary: dict[str, Any], events: Path) -> None:
    """Everything law 4 compares: weights, and as JSON the decisions, the loss log and the summary, without times."""
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().clone().contiguous() for name, value in trainer.model.state_dict().items()}
    save_file(weights, target / "weights.safetensors")
    summary.pop("seconds")
    best = trainer.state.best_model_checkpoint
    record = {
        "decisions": [untimed(e) for e in read_events(events) if e["event"] == "decision"],
        "checkpoints_logged": [e["step"] for e in read_events(events) if e["event"] == "checkpoint"],
        "runs_logged": sum(e["event"] == "run" for e in read_events(events)),
        "log": [untimed(entry) for entry in trainer.state.log_history if "train_loss" not in entry],
        "best": Path(best).name if best else None,
        "summary": summary,
    }
    (target / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    """An event, or a line of the Trainer's log, without what a clock says."""
    return {k: v for k, v in entry.items() if k != "time" and not k.endswith(("_runtime", "_per_second"))}


# -- where a run can be killed --------------------------------------------------------------------------


def die() -> None:
    """End this process as a power cut would: no handler, no ``finally``, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Die where ``owner.name`` is called and ``when`` says so."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


class KillAt(TrainerCallback):
    """Dies at an event of the Trainer, at or after a given step."""

    def __init__(self, event: str, step: int) -> None:
        def react(args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            if state.global_step >= step:
                die()

        setattr(self, event, react)


def aim(trainer: Trainer, point: str) -> None:
    """Arrange for death at ``point``, a name and a step (see the branches); call before ``attach``."""
    name, _, number = point.partition(":")
    step = int(number)

    def reached(*_: Any) -> bool:
        return bool(trainer.state.global_step >= step)

    if name in ("step_end", "epoch_end", "evaluate", "train_end"):
        trainer.add_callback(KillAt(f"on_{name}", step))
    elif name == "before-host-files":  # ours are written, none of the Trainer's
        before(Trainer, "_save_checkpoint", reached)
    elif name == "between-host-files":  # the weights are written, the optimizer is not
        before(Trainer, "_save_optimizer_and_scheduler", reached)
    elif name == "before-trainer-state":  # everything but the file that makes a checkpoint complete
        before(TrainerState, "save_to_json", reached)
    elif name == "before-rotation":
        before(transformers.trainer, "rotate_checkpoints", reached)
    elif name == "inside-our-state":  # the tensors are written, the JSON is not
        before(frostline.state, "_replace", reached)
    elif name == "frozen":  # a decision has been applied, the engine has not finished with it
        _die_once_frozen(step)
    else:
        raise ValueError(f"no such point: {point}")


def _die_once_frozen(depth: int) -> None:
    original = Freezer.apply

    def apply(self: Freezer, decision: Decision) -> None:
        original(self, decision)
        if decision.depth >= depth:
            die()

    Freezer.apply = apply  # type: ignore[method-assign]


# -- what a resumed run needs, taken away: the tests of law 4 must then fail ---------------------------------


def _without_state() -> None:
    frostline.engine.Frostline.load_state_dict = lambda self, saved: None  # type: ignore[method-assign]


def _without_epoch_start() -> None:
    huggingface.restore = lambda state: None


def _without_sums() -> None:
    GradientSum.tensors = lambda self: {}  # type: ignore[method-assign]


def _without_loss() -> None:
    huggingface.Frost._restore_loss = lambda self, saved, step: None  # type: ignore[method-assign]


def _without_waiting() -> None:
    huggingface.Frost._ends_epoch = lambda self, state: False  # type: ignore[method-assign]


def _without_boundary() -> None:
    huggingface.Frost._restore_boundary = lambda self: None  # type: ignore[method-assign]


def _without_stop() -> None:
    huggingface.Frost._run_epoch = lambda self, original, *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]


SABOTAGES = {
    "state": _without_state,
    "epoch-start": _without_epoch_start,
    "sums": _without_sums,
    "loss": _without_loss,
    "waiting": _without_waiting,
    "boundary": _without_boundary,
    "stop": _without_stop,
}


# -- the server ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Carry out orders until standard input ends."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        order = json.loads(line)
        limit = order.pop("seconds")
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _be_the_run(order)
        status = _wait(pid, start, limit)
        print(json.dumps({"status": status, "seconds": time.perf_counter() - start}), flush=True)


def _be_the_run(order: dict[str, Any]) -> None:
    folder = Path(order.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    # Standard output carries the answers; what the Trainer prints goes elsewhere.
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        run(folder, **order)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, start: float, limit: float | None) -> int:
    """The exit status of ``pid`` (negative: a signal), killed once ``limit`` seconds have gone by."""
    while True:
        ended, status = os.waitpid(pid, 0 if limit is None else os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        assert limit is not None
        if time.perf_counter() - start >= limit:
            os.kill(pid, signal.SIGKILL)
            limit = None
        else:
            time.sleep(0.001)


if __name__ == "__main__":
    serve()
