"""A fully cached step against its bound: the step of the truncated model, fed from memory.

    frostline fetch minilm trec reuters8
    python benchmarks/cache.py minilm                # writes benchmarks/results/cache-minilm.json
    python benchmarks/cache.py minilm --tier disk    # writes benchmarks/results/cache-minilm-disk.json
    python benchmarks/cache.py --base --device cuda --tier device   # and memory, disk: BERT-base's shape on a GPU

At each depth k = 1..N-1 a whole optimizer step with ``Frostline(policy="static", depth=k)`` and a cache in which every
sample has a record is timed in turn with the same step of the truncated model (blocks k..N-1 and head, which gets its
hidden state from memory), and with the uncached step. Real texts, fp32, dropout, clipping, fused AdamW. Several batches
take turns, so that neither side lives in the processor's caches. Target: at most 1.10 from memory, 1.15 from disk.
With --base, in place of MODEL: random weights of BERT-base's shape at depths 1, 3, 6, 9 and 11, random tokens (32 rows
of at most 512), autocast to bfloat16.

From disk: the page cache is dropped before each batch is fetched (``posix_fadvise``, inside the timed step), and the
loop goes through ``frost.loader``, which reads one batch ahead.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.batches import Batch, base_model, load_model, made_up_batch, real_batch  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from benchmarks.steps import adamw, update  # noqa: E402
from benchmarks.timing import paired_ratio, seconds_per_call, spread  # noqa: E402
from benchmarks.truncated import Prefix, Truncated  # noqa: E402
from frostline import BlockStack, Frostline  # noqa: E402
from frostline.cache.disk import DiskStore  # noqa: E402
from frostline.cache.tiers import disk_of  # noqa: E402

TARGETS = {"device": 1.10, "memory": 1.10, "disk": 1.15}
TIERS: dict[str, dict[str, Any]] = {
    "device": {"mode": "memory", "device": "8GB", "memory": 0},
    "memory": {"mode": "memory"},
    "disk": {"mode": "disk", "memory": 0},
}
BASE = (32, 512)
BASE_DEPTHS = (1, 3, 6, 9, 11)
SHAPES = (("reuters8", 16, 64), ("trec", 16, 16))
BATCHES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="minilm", help="asset, folder or hub id of a text encoder")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds over all depths (default 12)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--tier", choices=TARGETS, default="memory", help="where the records are (default memory)")
    parser.add_argument("--base", action="store_true", help="random weights of BERT-base's shape, in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/cache-<model>[-<tier>].json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tier == "device" and options.device == "cpu":
        parser.error("--tier device needs --device cuda")
    report: dict[str, Any] = {
        "model": "bert-base" if options.base else Path(options.model).name,
        **made_by("cache.py", options.seed, options.device),
        "tier": options.tier,
        "shapes": [],
    }
    seeds = range(options.seed, options.seed + BATCHES)
    if options.base:
        model = base_model(options.seed, options.device)
        vocabulary = model.get_parameter("bert.embeddings.word_embeddings.weight").shape[0]
        batches = [made_up_batch(vocabulary, *BASE, seed, options.device) for seed in seeds]
        report["shapes"].append(measure(model, batches, options))
    else:
        model, tokenizer = load_model(options.model, options.seed, options.device)
        for data, rows, length in SHAPES:
            batches = [real_batch(tokenizer, data, rows, length, seed, options.device) for seed in seeds]
            report["shapes"].append(measure(model, batches, options))
    tier = "" if options.tier == "memory" else f"-{options.tier}"
    out = options.out or RESULTS / f"cache-{report['model']}{tier}.json"
    write(report, out)
    for shape in report["shapes"]:
        for row in shape["depths"]:
            print(shape["batch"]["data"], row["depth"], row["ratio"], row["speedup_over_uncached"]["median"])


def measure(model: nn.Module, batches: list[Batch], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step at each depth: cached, truncated, uncached."""
    measured = BASE_DEPTHS if options.base else range(1, len(BlockStack.find(model)))
    depths = [_measure_depth(model, batches, depth, options) for depth in tqdm(measured, desc=batches[0].data)]
    return {"batch": batches[0].numbers(), "batches": len(batches), "rounds": options.rounds, "depths": depths}


def _measure_depth(model: nn.Module, batches: list[Batch], depth: int, options: argparse.Namespace) -> dict[str, Any]:
    rounds, seed, device = options.rounds, options.seed, options.device
    stack = BlockStack.find(model)
    truncated = Truncated(stack, depth, batches[0].inputs)
    prefix = Prefix(stack, depth)
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.base)
    with precision:
        hidden = [prefix.run(batch.inputs).clone() for batch in batches]
    optimizers = {name: adamw(p for p in model.parameters()) for name in ("cached", "uncached")}
    bound_optimizer = adamw(truncated.parameters)

    def job(name: str, frost: Frostline | None) -> Callable[[], Any]:
        turn = itertools.count()
        if name == "truncated" or frost is None:

            def step() -> None:
                i = next(turn) % len(batches)
                truncated.feed(hidden[i])
                with precision:
                    loss = truncated.model(**batches[i].inputs).loss
                loss.backward()
                update(truncated.parameters, bound_optimizer)
        else:
            coming = iter(frost.loader(itertools.cycle([batch.inputs for batch in batches])))

            def step() -> None:
                if (disk := _disk(frost)) is not None:
                    disk.uncache()
                batch = next(coming)
                with precision:
                    loss = model(**batch).loss
                loss.backward()
                frost.before_step()
                update(list(model.parameters()), optimizers[name])
                frost.after_step()

        return step

    samples: dict[str, list[float]] = {name: [] for name in ("cached", "truncated", "uncached")}
    order = random.Random(seed)
    counts: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in order.sample(list(samples), len(samples)):
            frost = None
            if name != "truncated":
                frost = Frostline(
                    model, optimizers[name], policy="static", depth=depth,
                    cache=TIERS[options.tier] if name == "cached" else "off", steps_per_epoch=1000, epochs=2,
                    batch_size=batches[0].rows,
                )  # fmt: skip
                model.train()
            step = job(name, frost)
            for _ in batches:  # fills the cache, warms the others up as much
                step()
            if (disk := _disk(frost)) is not None:
                disk.cool()
            seconds = seconds_per_call(step, len(batches), device)
            if frost is not None:
                found = frost.summary()["cache"]
                frost.finish()
                if found is not None:
                    counts = {key: found[key] for key in ("hits", "misses", "written", "bytes")}
                    assert found["hits"] >= len(batches) * batches[0].rows, found  # a text may be drawn twice
            if number:
                samples[name].append(seconds)
    return {
        "depth": depth,
        "ratio": paired_ratio(samples["cached"], samples["truncated"], seed),
        "speedup_over_uncached": paired_ratio(samples["uncached"], samples["cached"], seed),
        "target": TARGETS[options.tier],
        "cache": counts,
        "seconds": {name: spread(values) for name, values in samples.items()},
        "samples": samples,
    }


def _disk(frost: Frostline | None) -> DiskStore | None:
    return disk_of(frost.cache.store) if frost is not None and frost.cache is not None else None


if __name__ == "__main__":
    main()
