"""How long a step takes at each depth, against the bound; what policy none and the gradient statistics cost.

    frostline fetch minilm trec reuters8
    python benchmarks/step_time.py minilm     # writes benchmarks/results/step_time-minilm.json
    python benchmarks/table.py                # the tables of the README, from the results

Three parts, each on real texts, in fp32, with dropout, gradient clipping and fused AdamW:

depths      A whole optimizer step with ``Frostline(policy="static", depth=k)``, k = 0..N-1, against the bound: the
            step of the truncated model (blocks k..N-1 and head, fed from memory) plus a forward pass of the prefix
            without gradients. Target: at most 1.10.
none        Loops of 25 steps with and without ``Frostline(policy="none")``, and the same with a Trainer. Target: the
            interval of the ratio contains 1.00.
statistics  ``before_step`` of policy gradient-norm at depth 0, where all blocks are summed, against the rest of the
            step. Target: at most 3 %.

All variants are timed in turn, in a new random order each round, so that what slows the machine down for a while
slows all of them; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.batches import CLASSES, Batch, load_model, made_up_batch, real_batch  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from benchmarks.steps import measure_depths, measure_none, measure_statistics  # noqa: E402
from frostline import FrostlineError  # noqa: E402

PARTS = ("depths", "none", "statistics")
# Data, rows and length in tokens. The last is small: policy none is about what a step costs beside its arithmetic.
BATCHES = (("reuters8", 16, 64), ("trec", 16, 16), ("trec", 4, 16))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    name = "quick" if options.quick else Path(options.model).name
    out = options.out or RESULTS / f"step_time-{name}.json"
    if options.quick:
        options.rounds, options.pairs, options.steps = 3, 3, 2
    try:
        report = _measure(options, name)
    except FrostlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write(report, out)
    print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="minilm", help="asset, folder or hub id of a text encoder")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this; may be given again")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds over all depths (default 15)")
    parser.add_argument(
        "--pairs", type=int, default=40, help="pairs of loops with and without policy none (default 40)"
    )
    parser.add_argument("--steps", type=int, default=25, help="steps in each of those loops (default 25)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of texts, order, dropout and bootstrap (default 0)")
    parser.add_argument("--out", type=Path, help="results file (default benchmarks/results/step_time-<model>.json)")
    parser.add_argument("--quick", action="store_true", help="seconds, on a tiny random model: does it run at all?")
    return parser


def _measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    seed, device = options.seed, options.device
    model, batches = _tiny(seed, device) if options.quick else _real(options.model, seed, device)
    parts = options.part or PARTS
    *usual, small = batches
    report: dict[str, Any] = {
        "model": name,
        "class": type(model).__name__,
        **made_by("step_time.py", seed, device),
    }
    if "depths" in parts:
        report["depths"] = [measure_depths(model, batch, options.rounds, seed, device) for batch in usual]
    if "none" in parts:
        report["none"] = measure_none(model, small, options.pairs, options.steps, seed, device)
    if "statistics" in parts:
        report["statistics"] = [measure_statistics(model, b, 2 * options.rounds, seed, device) for b in usual]
    return report


def _real(model: str, seed: int, device: str) -> tuple[torch.nn.Module, list[Batch]]:
    """The model and the batches."""
    network, tokenizer = load_model(model, seed, device)
    return network, [real_batch(tokenizer, *wanted, seed, device) for wanted in BATCHES]


def _tiny(seed: int, device: str) -> tuple[torch.nn.Module, list[Batch]]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=CLASSES,
    )  # fmt: skip
    batches = [made_up_batch(64, 4, 8, seed, device), made_up_batch(64, 2, 8, seed, device)]
    return BertForSequenceClassification(config).to(device), batches


if __name__ == "__main__":
    sys.exit(main())
