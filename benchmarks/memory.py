"""What training takes of memory, and of time, in each of a dozen ways; random weights of base size.

    python benchmarks/memory.py bert --rows 32 --length 128 --threads 2   # writes results/memory-bert-32x128.json
    python benchmarks/memory.py bert --part time --rows 8 --threads 2     # writes results/memory_time-bert-8x128.json
    python benchmarks/memory.py bert --part time --rows 8 --threads 2 --modes "LoRA r=8"    # other ways than the four
    python benchmarks/memory.py bert --device cuda --autocast             # ... -gpu-bf16.json

memory  Each mode in a process of its own. ``saved``: bytes that autograd keeps, storages counted once, parameters not.
        ``peak``: the most bytes alive at any moment of a whole step, weights, moments, gradients and temporaries
        included, counted by storages. ``resident``: the same as the operating system sees it. On a GPU
        ``peak`` is what its allocator reports. Where layers take turns, all three are those of the turn that takes most
        (the embedding trains, and the layers with the widest inputs); ``usual`` and ``usual_saved`` are of a turn as
        they come.
time    A step of each compressed mode against the same mode uncompressed, in turn in one process. Target: at most
        1.30 on a CPU, 1.15 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are found from the root of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.modes import MODES, Mode, Training, build  # noqa: E402
from benchmarks.reports import RESULTS, made_by, write  # noqa: E402
from benchmarks.timing import paired_ratio, seconds_per_call, spread  # noqa: E402
from frostline.memory import Footprint, LiveBytes, footprint  # noqa: E402

TARGET = {"cpu": 1.30, "cuda": 1.15}
# Modes that are timed against themselves without compression.
_TIMED = ("full", "resting 0.9", "half frozen", "gradient checkpointing")
_TIMED_LEVELS = ("safe", "slimfit", "max")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "time"), default="memory")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds (default 8)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help=f"ways to measure (default all; of time: {', '.join(_TIMED)})"
    )
    arguments_of_shape(parser, rows=32, modes=MODES)
    options = parser.parse_args(arguments)
    if options.part == "time" and (packed := [name for name in options.modes or () if MODES[name].level != "off"]):
        parser.error(f"--part time compresses by itself: name ways without a level, not {', '.join(packed)}")
    torch.set_num_threads(options.threads)
    if options.mode:
        print(json.dumps(measure_memory(MODES[options.mode], options)[0]))
        return 0
    out = options.out or results_of("memory" if options.part == "memory" else "memory_time", options)
    report = {**shape_of(options), **made_by("memory.py", options.seed, options.device)}
    if options.part == "memory":
        finish({**report, "modes": each_alone(__file__, options.modes or list(MODES), report, options, out)}, out)
    else:
        write({**report, "modes": measure_time(options, options.modes or _TIMED)}, out)
    print(out)
    return 0


def arguments_of_shape(parser: argparse.ArgumentParser, *, rows: int, modes: Iterable[str]) -> None:
    """What every benchmark of base-size models is told."""
    parser.add_argument("shape", nargs="?", choices=("bert", "vit"), default="bert")
    parser.add_argument("--rows", type=int, default=rows, help=f"samples in a batch (default {rows})")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample (default 128)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--autocast", action="store_true", help="forward passes in bfloat16")
    parser.add_argument(
        "--at-once", type=int, default=1, help="processes at a time that measure memory alone (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("--mode", choices=sorted(modes), help="measure this way here, and print what was found")


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a report says of the batches."""
    length = options.length if options.shape == "bert" else None
    shape = {"shape": options.shape, "rows": options.rows, "length": length, "rounds": options.rounds}
    return {**shape, "autocast": options.autocast}


def results_of(kind: str, options: argparse.Namespace) -> Path:
    """Where the results go if nobody says where."""
    size = f"{options.rows}x{options.length}" if options.shape == "bert" else str(options.rows)
    where = "-gpu" if options.device.startswith("cuda") else ""
    return RESULTS / f"{kind}-{options.shape}-{size}{where}{'-bf16' if options.autocast else ''}.json"


# -- memory -----------------------------------------------------------------------------------------------


def each_alone(
    script: str, names: list[str], report: dict[str, Any], options: argparse.Namespace, out: Path
) -> list[dict[str, Any]]:
    """What ``script --mode`` says of each of ``names``, in a process of its own: no other leaves anything behind.

    Each is written down as soon as it is measured, beside ``out``: a run that was stopped goes on after the last one.
    """
    part = out.with_suffix(".part.json")
    found: dict[str, dict[str, Any]] = {}
    if part.exists():
        earlier = json.loads(part.read_text(encoding="utf-8"))
        same = ("shape", "rows", "length", "rounds", "autocast", "seed", "device", "environment")
        if all(earlier.get(key) == report[key] for key in same):
            found = {mode["mode"]: mode for mode in earlier["modes"]}

    one_at_a_time, failed = Lock(), Event()

    def measured(name: str) -> None:
        if failed.is_set():
            return
        command = [
            sys.executable, script, options.shape, "--mode", name, "--rows", str(options.rows), "--length",
            str(options.length), "--threads", str(options.threads), "--device", options.device, "--seed",
            str(options.seed), "--rounds", str(options.rounds), *(["--autocast"] if options.autocast else []),
        ]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            failed.set()
            raise SystemExit(f"mode {name!r} failed:\n{child.stderr}")
        with one_at_a_time:
            found[name] = json.loads(child.stdout.splitlines()[-1])
            write({**report, "modes": [found[name] for name in names if name in found]}, part)

    with ThreadPoolExecutor(options.at_once) as pool:
        jobs = [pool.submit(measured, name) for name in names if name not in found]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="modes"):
            job.result()
    return [found[name] for name in names]


def finish(report: dict[str, Any], out: Path) -> None:
    """Write the whole report; what :func:`each_alone` has written down meanwhile goes."""
    write(report, out)
    out.with_suffix(".part.json").unlink(missing_ok=True)


def measure_memory(mode: Mode, options: argparse.Namespace) -> tuple[dict[str, Any], Training]:
    """Bytes of one way: saved, at the peak, resident. And the training itself, which may go on."""
    before = _resident() if not options.device.startswith("cuda") else 0
    training = build_as(mode, options)
    training.settle(options.seed)
    usual = {"usual": None, "usual_saved": None}
    if mode.resting:
        usual = {"usual": _peak(training, options.device)[0], "usual_saved": _kept(training).total}
    training.take_the_heaviest_turn()
    peak, resident = _peak(training, options.device)
    training.take_the_heaviest_turn()
    kept = _kept(training)
    found = {
        "mode": mode.name,
        "level": mode.level,
        "weights": sum(t.numel() * t.element_size() for t in training.model.parameters()),
        "moments": sum(t.numel() * t.element_size() for t in training.tensors()) - sum(
            t.numel() * t.element_size()
            for t in (*training.model.parameters(), *training.model.buffers(), *training.inputs.values())
        ),
        "saved": kept.total,
        "saved_by_operation": kept.by_operation(),
        "peak": peak,
        **usual,
        "resident": resident - before,
    }  # fmt: skip
    return found, training


def _kept(training: Training) -> Footprint:
    """What autograd keeps of a pass, with those layers training that are to train next."""
    if training.compressor is not None:
        training.compressor.detach()
    with training.precision:
        kept = footprint(training.model, training.stack.blocks, ((), training.parts[0]), training.mode.level)
    training.compress()
    return kept


def build_as(mode: Mode, options: argparse.Namespace) -> Training:
    """``mode`` as the command line has it."""
    shape = (options.shape, options.rows, options.length)
    return build(mode, *shape, options.seed, options.device, autocast=options.autocast)


def _peak(training: Training, device: str) -> tuple[int, int]:
    """The most bytes alive at any moment of a step, and the most that the process, or the allocator, had."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        training.step()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark starts anew
    with LiveBytes(training.tensors()) as live:
        training.step()
    return live.peak, _highest()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _resident() -> int:
    return _status("VmRSS:")


def _highest() -> int:
    return _status("VmHWM:")


# -- time -------------------------------------------------------------------------------------------------


def measure_time(options: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds a step of each mode and level against the mode alone, in turn."""
    found = []
    for base in tqdm(names, desc="modes"):
        levels = ("slimfit",) if base == "gradient checkpointing" else _TIMED_LEVELS
        trainings = {
            mode.level: build_as(mode, options)
            for mode in (MODES[base], *(MODES[base].compressed(level) for level in levels))
        }
        for training in trainings.values():
            training.settle(options.seed)
        samples: dict[str, list[float]] = {level: [] for level in trainings}
        order = random.Random(options.seed)
        for _ in range(options.rounds):
            for level in order.sample(list(trainings), len(trainings)):
                samples[level].append(seconds_per_call(trainings[level].step, 1, options.device))
        for level in levels:
            ratio = paired_ratio(samples[level], samples["off"], options.seed)
            target = TARGET[torch.device(options.device).type]
            found.append(
                {
                    "mode": base,
                    "level": level,
                    "ratio": ratio,
                    "target": target,
                    "met": ratio["median"] <= target,
                    "seconds": {name: spread(values) for name, values in samples.items()},
                    "samples": samples,
                }
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
