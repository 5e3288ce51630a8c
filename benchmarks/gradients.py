"""How true compressed gradients are on a real model in training: cosines against exact ones, by part and level.

    python benchmarks/gradients.py trec     # writes benchmarks/results/gradients-trec.json

The recipe's model trains on its data first (100 steps, exactly, without freezing); then, on validation batches, one
pass at each level is compared with the same pass without compression, under the same dropout: with everything in
training, and with the weights of all normalisations at rest, as policy ``interlayer`` may have them (some levels keep
their inputs in fewer bits then). The least over the batches counts. Targets: 0.999 (safe) and 0.99 (slimfit) for every
part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from frostline import BlockStack  # noqa: E402
from frostline.freezer import Freezer  # noqa: E402
from frostline.memory import LEVELS, footprint, gradient_cosines  # noqa: E402
from frostline.policies import Decision  # noqa: E402
from frostline.recipes.runner import prepare  # noqa: E402
from frostline.recipes.schema import load_recipe  # noqa: E402
from frostline.tasks.registry import TASKS  # noqa: E402

TARGETS = {"safe": 0.999, "slimfit": 0.99}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="trec", help="a shipped recipe or a YAML file (default trec)")
    parser.add_argument("overrides", nargs="*", help="dotted overrides of the recipe")
    parser.add_argument("--steps", type=int, default=100, help="steps of training before (default 100)")
    parser.add_argument("--batches", type=int, default=5, help="batches that are compared (default 5)")
    parser.add_argument("--rows", type=int, default=16, help="samples in a batch (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gradients-<recipe>.json")
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, options.overrides)
    data = prepare(recipe)
    model = TASKS[recipe.task].build_model(data, recipe.model, options.seed).to(options.device)
    torch.manual_seed(options.seed)
    training, unseen = (
        DataLoader(part.select(range(rows * options.rows)), options.rows, shuffle=True, collate_fn=data.collator)
        for part, rows in ((data.train, options.steps), (data.validation, options.batches))
    )
    train(model, [dict(batch.to(options.device)) for batch in training], recipe.training["learning_rate"])
    found = compare(model, [dict(batch.to(options.device)) for batch in unseen])
    report = {
        "recipe": recipe.name,
        "model": recipe.model,
        "rows": options.rows,
        "steps": options.steps,
        "batches": options.batches,
        **made_by("gradients.py", options.seed, options.device),
        "levels": found,
    }
    out = options.out or RESULTS / f"gradients-{recipe.name}.json"
    write(report, out)
    for level, measured in found.items():
        least = (f"{min(measured[which].values()):.5f}" for which in ("cosines", "resting"))
        print(level, f"{measured['smaller']:.1f}x", *least)
    return 0


def train(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], rate: float) -> None:
    """A step for each batch, exactly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    model.train()
    for inputs in tqdm(batches, desc="training", unit="step"):
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def compare(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """For each level: least cosine of each part (``resting``: with all norms at rest), and how much less is kept."""
    stack = BlockStack.find(model)
    model.train()
    whole = sum(footprint(model, stack.blocks, ((), inputs)).total for inputs in batches)
    norms = frozenset(name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 1)
    freezer = Freezer(stack)
    found = {}
    for level in tqdm([name for name in LEVELS if name != "off"], desc="levels"):
        cosines = _least(stack, batches, level)
        freezer.apply(Decision(0, norms))
        resting = _least(stack, batches, level)
        freezer.release()
        kept = sum(footprint(model, stack.blocks, ((), inputs), level).total for inputs in batches)
        target = TARGETS.get(level)
        met = target is None or min(*cosines.values(), *resting.values()) >= target
        found[level] = {
            "cosines": cosines, "resting": resting, "smaller": whole / kept, "target": target, "met": met,
        }  # fmt: skip
    return found


def _least(stack: BlockStack, batches: list[dict[str, torch.Tensor]], level: str) -> dict[str, float]:
    each = [gradient_cosines(stack, ((), inputs), level) for inputs in batches]
    return {part: min(cosine[part] for cosine in each) for part in each[0]}


if __name__ == "__main__":
    sys.exit(main())
