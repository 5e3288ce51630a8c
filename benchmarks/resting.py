"""What resting saves, and which layers it is that rest: SlimFit's ranking beside Frostline's, on models in training.

    python benchmarks/resting.py     # writes benchmarks/results/resting.json; a few minutes

Each recipe's model trains on its own data for some steps under policy ``interlayer``, with layers ranked all against
each other (``within: model``, as published) and like with like (``within: kind``). Floating-point operations are
counted, not timed: of the work on gradients of weights (what a whole backward pass does more than one in which all
layers rest) the share that was skipped. Counting begins once each layer has been visited.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_tables import SORTS, resting  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from benchmarks.steps import update  # noqa: E402
from frostline import Frostline  # noqa: E402
from frostline.recipes.runner import prepare  # noqa: E402
from frostline.recipes.schema import load_recipe  # noqa: E402
from frostline.tasks.registry import TASKS  # noqa: E402

RECIPES = ("trec", "fashion-mnist", "fashion-mnist-cnn")
WAYS = ((0.5, "model"), (0.9, "model"), (0.34, "kind"), (0.5, "kind"), (0.9, "kind"))
EVERY = 10  # steps between two counts of operations


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="shipped recipes or YAML files")
    parser.add_argument("--steps", type=int, default=120, help="steps of training (default 120)")
    parser.add_argument("--rows", type=int, default=16, help="samples in a batch (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "resting.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "steps": options.steps,
        "rows": options.rows,
        **made_by("resting.py", options.seed, "cpu"),
        "models": {},
    }
    for name in options.recipes:
        report["models"][name] = of_recipe(name, options.steps, options.rows, options.seed)
        write(report, options.out)
    print("\n".join(resting(report)))
    return 0


def of_recipe(name: str, steps: int, size: int, seed: int) -> list[dict[str, Any]]:
    """All of ``WAYS`` on one recipe, from the same weights and with the same batches."""
    recipe = load_recipe(name)
    data = prepare(recipe)
    torch.manual_seed(seed)
    loader = DataLoader(data.train.select(range(steps * size)), size, shuffle=True, collate_fn=data.collator)
    batches = [dict(batch) for batch in loader]
    found = []
    for share, within in tqdm(WAYS, desc=name, unit="way"):
        model = TASKS[recipe.task].build_model(data, recipe.model, seed).train()
        rate = float(recipe.training["learning_rate"])
        found.append({"share": share, "within": within, **train(model, batches, rate, share=share, within=within)})
    return found


def train(model: nn.Module, batches: list[dict[str, torch.Tensor]], rate: float, **options: Any) -> dict[str, Any]:
    """A step for each batch under policy ``interlayer``.

    Returns:
        ``trained``: of each sort of layers how many there are, and the mean share of steps at which one trained;
        ``skipped``: the share of the operations on gradients of weights that was not done.
    """
    whole, none = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    frost = Frostline(
        model, optimizer, policy="interlayer", cache="off", steps_per_epoch=len(batches), epochs=1, **options
    )  # fmt: skip
    layers = set(frost.policy.layers)  # type: ignore[attr-defined]
    for path in layers:
        none.get_parameter(path).requires_grad_(False)
    trained: Counter[str] = Counter()
    parameters, counted, skipped = list(model.parameters()), 0, []
    for step, inputs in enumerate(batches):
        visited = layers <= set(frost.policy.distances)  # type: ignore[attr-defined]
        resting = frost.freezer.decision.resting
        if visited and step % EVERY == 0:
            everything, nothing, here = (_operations(each, inputs) for each in (whole, none, model))
            model.zero_grad()
            skipped.append((everything - here) / (everything - nothing))
        if visited:
            counted += 1
            trained.update(layers - resting)
        model(**inputs).loss.backward()
        frost.before_step()
        update(parameters, optimizer)
        frost.after_step()
    frost.finish()
    sorts = {path: _sort(model, path) for path in layers}
    return {
        "trained": {
            sort: {"layers": len(paths), "of_steps": mean(trained[path] / counted for path in paths)}
            for sort in SORTS
            if (paths := [path for path in layers if sorts[path] == sort])
        },
        "skipped": mean(skipped),
    }


def _operations(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return int(counter.get_total_flops())


def _sort(model: nn.Module, path: str) -> str:
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Embedding):
        return "tables"
    return "norms" if model.get_parameter(path).ndim == 1 else "matrices"


if __name__ == "__main__":
    sys.exit(main())
