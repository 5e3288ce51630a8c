"""What steps of a recipe's own model take, on its own batches, and the profile that this makes.

Whole steps are timed with nothing, half and all but one of the blocks frozen, and so is the prefix alone. All of it on
the same batches, in turn, so that what slows the machine down for a while slows every depth. What lies between two
depths is shared out among the parts: the backward pass and the prefix as a pass with the clock read at each block says
(:func:`frostline.inspection.timed_pass`), the optimizer's update by bytes. At the depths that were measured the profile
therefore gives back what was measured.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DefaultFlowCallback, Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from frostline.cache.passes import Passes
from frostline.freezer import Freezer
from frostline.inspection import now, timed_pass
from frostline.memory import Bench, MemoryModel, Way
from frostline.policies.base import Decision
from frostline.simulator import Part, Profile
from frostline.simulator.cluster import Blocks

__all__ = ["Measured", "measure_steps"]

# Of four times as many that are drawn, by size: with texts of different lengths a few at random would be a bad sample.
_BATCHES, _DRAWN = 12, 48
# A model so slow that the batches take longer is measured on fewer of them.
_SECONDS, _FEWEST = 90.0, 4
# Steps of a Trainer that computes nothing.
_BARE = 40


@dataclass(frozen=True)
class Measured:
    """Mean seconds over ``batches`` micro-batches of ``rows`` samples.

    Attributes:
        rows: samples in a micro-batch.
        batches: how many were measured.
        data: until the rows of one were read and put together; 0 where workers do that beside the training.
        passes: forward and backward pass of one, by depth.
        updates: clipping and the optimizer's step, by depth.
        prefixes: everything below the line, without gradients, by depth.
        forward, backward: of the stem, each block and the head in a pass at depth 0, clocks and all.
        spread: the pass at depth 0 of each batch by itself.
        around: what the Trainer does beside all that in a step (its loop, callbacks, schedule).
    """

    rows: int
    batches: int
    data: float
    passes: Mapping[int, float]
    updates: Mapping[int, float]
    prefixes: Mapping[int, float]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    spread: tuple[float, ...]
    around: float

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def profile(self, name: str, memory: MemoryModel, way: Way, *, accumulates: int = 1, ranks: int = 1) -> Profile:
        """The model as the simulator takes it.

        What only a part that trains takes (dropout, what autograd keeps) is counted as its backward pass: the forward
        pass is what is left of a part that is frozen, and what a record saves. Ranks wait for the one whose batch is
        the longest, so that a sample takes longer the more of them there are.

        Args:
            name: of the model.
            memory: what steps take of memory, measured in ``way``.
            way: how they are run.
            accumulates: micro-batches in a step, of which one at a time is alive.
            ranks: that train together.
        """
        last = max(self.passes)
        below = last + 1  # the stem freezes with block 0
        frozen = _shared_out(self.prefixes, self.forward[:below])
        trained = _shared_out({k: self.passes[0] - self.passes[k] for k in self.prefixes}, self.backward[:below])
        updated = _shared_out({k: self.updates[0] - self.updates[k] for k in self.prefixes}, memory.trains[:below])
        # The last block and the head, which always train, and the data, of which no record saves anything.
        whole = max(0.0, self.passes[last] - self.prefixes[last])
        top = _in_proportion(whole, [*self.forward[below:], *self.backward[below:]])
        forward, backward = [*frozen, top[0], top[1] + self.data], [*trained, *top[2:]]
        sample = _longest_of(ranks, self.spread) / statistics.fmean(self.spread) / self.rows
        kept = memory.activations[way].per_row.kept
        parts = [
            {
                "forward_seconds": sample * forward[i],
                "backward_seconds": sample * backward[i],
                "update_seconds": updated[i] if i < below else 0.0,
                "parameter_bytes": memory.trains[i],
                "activation_bytes": int(kept[i] / accumulates),
            }
            for i in range(len(kept))
        ]
        more, some = (memory.peak(way, rows, accumulates=True) for rows in (2 * self.rows, self.rows))
        return Profile(
            name=name,
            stem=Part.model_validate(parts[0]),
            blocks=[Blocks.model_validate(part) for part in parts[1:-1]],
            head=Part.model_validate(parts[-1]),
            optimizer_state=memory.optimizer.state,
            sample_bytes=int(max(0.0, (more - some) / self.rows - sum(kept)) / accumulates),
            step_seconds=self.updates[last] + self.around,
        )


def _shared_out(totals: Mapping[int, float], shape: Sequence[float]) -> list[float]:
    """``totals[k]`` is what all parts below depth k take; what lies between two depths is shared out by ``shape``."""
    found: list[float] = []
    before = 0.0
    for depth in sorted(totals):
        # A few steps are noisy: less at a deeper line would be less than nothing for a part.
        total = max(before, totals[depth])
        found += _in_proportion(total - before, shape[len(found) : depth + 1])
        before = total
    return found


def _in_proportion(total: float, shape: Sequence[float]) -> list[float]:
    whole = sum(shape)
    return [total * weight / whole if whole else total / len(shape) for weight in shape]


def _longest_of(ranks: int, seconds: Sequence[float]) -> float:
    """What the longest of ``ranks`` batches takes on average, if each is one of those that were measured."""
    count = len(seconds)
    # The chance that it is the i-th in order: all are among the first i + 1, and not all among the first i.
    chances = [((i + 1) / count) ** ranks - (i / count) ** ranks for i in range(count)]
    return sum(value * chance for value, chance in zip(sorted(seconds), chances, strict=True))


def measure_steps(trainer: Trainer, bench: Bench, way: Way) -> Measured:
    """Time a few steps of ``trainer`` at each of three depths, with progress on stderr.

    Its model trains meanwhile, from the weights that it has; the optimizer is built, if there is none yet. It is not to
    be trained afterwards.

    Args:
        trainer: before ``train()``.
        bench: of the same Trainer.
        way: how its steps are run.
    """
    stack, model = bench.stack, bench.model
    depths = sorted({0, len(stack) // 2, len(stack) - 1})
    loader: Any = trainer.get_train_dataloader()
    chosen = _sample(loader, trainer.args.seed)
    draw, passes = random.Random(trainer.args.seed), Passes(stack, model)
    rounds: list[dict[tuple[str, int], float]] = []
    with bench.ready(way):
        optimizer = trainer.create_optimizer()
        # The optimizer is not told: moments that a freeze dropped would be made anew in a timed step.
        freezer = Freezer(stack)
        try:
            began = time.monotonic()
            # The first one is not counted: in it memory is allocated, and moments are made.
            for rows in tqdm([chosen[0], *chosen], desc="measuring", unit="batch"):
                if len(rounds) > _FEWEST and time.monotonic() - began > _SECONDS:
                    break
                found: dict[tuple[str, int], float] = {}
                start = now()
                inputs = dict(trainer._prepare_inputs(_batch(loader, rows)))
                found["data", 0] = now() - start if not trainer.args.dataloader_num_workers else 0.0
                for depth in draw.sample(depths, len(depths)) if rounds else depths:
                    freezer.apply(Decision(depth))
                    found |= _step(trainer, bench, way, optimizer, inputs, depth)
                    if depth:
                        start = now()
                        with bench.context():
                            passes.prefill(((), inputs), depth)
                        found["prefix", depth] = now() - start
                freezer.apply(Decision())
                with bench.context():
                    times = timed_pass(model, stack, ((), inputs))
                for kind, seconds in zip(("forward", "backward"), times, strict=True):
                    found |= {(kind, position): value for position, value in enumerate(seconds)}
                rounds.append(found)
        finally:
            freezer.release()
            model.zero_grad(set_to_none=True)
    return _means(rounds[1:], len(chosen[0]), _around(trainer))


def _around(trainer: Trainer) -> float:
    """Seconds of the Trainer's own work in a step: it trains some steps in which nothing is computed.

    They are counted from where it has a step's rows to where it asks for the next ones. It will have trained.
    """
    asked: list[float] = []
    given: list[float] = []
    fetch = trainer.get_batch_samples

    def timed(*args: Any, **kwargs: Any) -> Any:
        asked.append(time.perf_counter())
        batches = fetch(*args, **kwargs)
        given.append(time.perf_counter())
        return batches

    trainer.get_batch_samples = timed  # type: ignore[method-assign]
    trainer.training_step = lambda *_, **__: torch.zeros((), device=trainer.args.device)  # type: ignore[method-assign]
    for callback in list(trainer.callback_handler.callbacks):
        if not isinstance(callback, DefaultFlowCallback):  # what shows progress, writes files
            trainer.remove_callback(callback)
    args = trainer.args
    args.max_steps, args.eval_strategy, args.save_strategy = _BARE + 1, IntervalStrategy.NO, SaveStrategy.NO
    trainer.train()
    return statistics.median(after - before for before, after in zip(given, asked[1:], strict=False))


def _step(
    trainer: Trainer, bench: Bench, way: Way, optimizer: torch.optim.Optimizer, inputs: Mapping[str, Any], depth: int
) -> dict[tuple[str, int], float]:
    """Seconds of one step."""
    bench.model.zero_grad(set_to_none=True)
    start = now()
    loss = bench.forward(way, inputs)
    loss.backward()  # type: ignore[no-untyped-call]
    passed = now()
    if trainer.args.max_grad_norm:
        nn.utils.clip_grad_norm_(bench.model.parameters(), trainer.args.max_grad_norm)
    optimizer.step()
    bench.model.zero_grad(set_to_none=True)
    return {("pass", depth): passed - start, ("update", depth): now() - passed}


def _means(rounds: Sequence[Mapping[tuple[str, int], float]], rows: int, around: float) -> Measured:
    kinds: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for kind, place in sorted(rounds[0]):
        kinds[kind][place] = statistics.fmean(found[kind, place] for found in rounds)
    return Measured(
        rows,
        len(rounds),
        kinds["data"][0],
        kinds["pass"],
        kinds["update"],
        kinds["prefix"],
        tuple(kinds["forward"].values()),
        tuple(kinds["backward"].values()),
        tuple(found["pass", 0] for found in rounds),
        around,
    )


def _sample(loader: DataLoader[Any], seed: int) -> list[list[int]]:
    """Rows of whole batches as an epoch brings them: of each twelfth of their sizes one, in random order."""
    drawn = [list(rows) for rows in cast(Any, loader.batch_sampler)]
    most = max(len(rows) for rows in drawn)
    draw = random.Random(seed)
    whole = [rows for rows in drawn if len(rows) == most]
    whole = sorted(draw.sample(whole, min(_DRAWN, len(whole))), key=lambda rows: _size(_batch(loader, rows)))
    count = min(_BATCHES, len(whole))
    middles = [whole[(2 * i + 1) * len(whole) // (2 * count)] for i in range(count)]
    return draw.sample(middles, count)


def _batch(loader: DataLoader[Any], rows: Sequence[int]) -> Any:
    return loader.collate_fn([loader.dataset[row] for row in rows])


def _size(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))
