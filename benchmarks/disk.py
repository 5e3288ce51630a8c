"""Reading records from the disk tier, checksums on, against raw positional reads of the same bytes.

    python benchmarks/disk.py     # writes benchmarks/results/disk.json

Records of 9 KB (a short text in fp32) and of 200 KB are read in random batches of 32. Cold: before each batch its bytes
are dropped from the page cache (fsync, then ``posix_fadvise``); warm: the same batch once more. Raw reads take offsets
and sizes of the same kind with as many threads into one buffer. Both sides take turns. Target: at least 0.8 of the raw
speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from frostline.cache.disk import DiskStore
from frostline.events import environment

RESULTS = Path(__file__).parent / "results"
TARGET = 0.8
WIDTH = 384
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the folder for temporary files)")
    parser.add_argument("--megabytes", type=int, default=256, help="of records of each size (default 256)")
    parser.add_argument("--rounds", type=int, default=60, help="batches on each side (default 60)")
    parser.add_argument("--threads", type=int, default=8, help="readers on both sides (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "disk.json")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/disk.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": "cpu",
        "environment": environment(),
        "sizes": [],
    }
    for tokens in (6, 130):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            report["sizes"].append(measure(Path(folder), tokens, options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for size in report["sizes"]:
        print(json.dumps({k: v for k, v in size.items() if k != "samples"}))


def measure(folder: Path, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of both sides, cold and warm."""
    nbytes = tokens * WIDTH * 4
    count = options.megabytes * 1_000_000 // nbytes
    store = DiskStore(folder / "store", 1 << 40, prefix=lambda _: b"p" * 16, threads=options.threads, queued=1 << 30)
    generator = torch.Generator().manual_seed(options.seed)
    keys = [i.to_bytes(16, "little") for i in range(count)]
    started = time.perf_counter()
    for key in tqdm(keys, desc=f"writing {count} records of {nbytes} bytes", leave=False):
        store.put(key, 1, torch.randn(tokens, WIDTH, generator=generator))
    store.flush()
    written = count * nbytes / (time.perf_counter() - started)
    file = os.open(folder / "store" / "slots.bin", os.O_RDONLY)
    os.fsync(file)
    pool = ThreadPoolExecutor(options.threads)
    order = random.Random(options.seed)
    samples: dict[str, dict[str, list[float]]] = {kind: {"store": [], "raw": []} for kind in ("cold", "warm")}
    for _ in tqdm(range(options.rounds), desc=f"reading {nbytes} bytes", leave=False):
        for side in order.sample(["store", "raw"], 2):
            batch = order.sample(keys, BATCH)
            places = sorted((store._entries[key].slot.offset, 128 + nbytes) for key in batch)
            for offset, size in places:
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
            for kind in ("cold", "warm"):
                start = time.perf_counter()
                if side == "store":
                    assert all(record is not None for record in store.get_many(batch))
                else:
                    _raw(pool, file, places, options.threads)
                samples[kind][side].append(BATCH * nbytes / (time.perf_counter() - start))
    os.close(file)
    pool.shutdown()
    store.close()
    return {
        "bytes": nbytes,
        "records": count,
        "batch": BATCH,
        "write_bytes_per_second": written,
        **{kind: _ratio(found) for kind, found in samples.items()},
        "target": TARGET,
        "samples": samples,
    }


def _raw(pool: ThreadPoolExecutor, file: int, places: list[tuple[int, int]], threads: int) -> None:
    buffer = torch.empty(sum(size for _, size in places), dtype=torch.uint8).numpy().data
    starts = np.cumsum([0, *(size for _, size in places)]).tolist()

    def read(hand: int) -> None:
        for place in range(hand, len(places), threads):
            offset, size = places[place]
            os.preadv(file, [buffer[starts[place] : starts[place] + size]], offset)

    list(pool.map(read, range(threads)))


def _ratio(found: dict[str, list[float]]) -> dict[str, float]:
    medians = {side: float(np.median(values)) for side, values in found.items()}
    return {**{f"{side}_bytes_per_second": value for side, value in medians.items()},
            "ratio": medians["store"] / medians["raw"]}  # fmt: skip


if __name__ == "__main__":
    main()
