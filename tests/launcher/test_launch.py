"""Launched recipes on real processes: fewer ranks, larger batches, ranks that are killed, hosts that leave."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frostline.adapters import staging
from frostline.errors import ConfigError, FrostlineError
from frostline.events import read_events
from frostline.launcher import Hosts, launch, supervisor
from frostline.packing import Stages, account
from frostline.recipes.runner import run, run_stage
from frostline.recipes.schema import Recipe
from frostline.recipes.staged import Launch
from tests.recipes.workbench import ROWS, make_data, make_model, recipe_content, write_recipe_file

# The frost line rises after 72 samples (inside the first epoch of 96), after 144 (inside the second), and at the end.
RAMP = {"policy": "ramp", "start": 0.0, "level": 0.75, "evaluations_per_epoch": 4}
PACK = {"memory": "1GiB", "restart": 0}

Launched = Callable[..., Path]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A function that launches the recipe once for each set of arguments, and returns its directory."""
    done: dict[str, Path] = {}

    def start(
        ranks: int,
        mode: str,
        *,
        dropout: float = 0.0,
        cache: str = "off",
        kills: list[dict[str, Any]] | None = None,
        **pack: Any,
    ) -> Path:
        name = json.dumps([ranks, mode, dropout, cache, kills, pack])
        if name not in done:
            root = tmp_path_factory.mktemp("launched")
            caching = {"mode": cache, **({"folder": str(root / "records")} if cache == "disk" else {})}
            content = recipe(root, dropout, pack={**PACK, "mode": mode, **pack}, cache=caching)
            content["training"]["per_device_train_batch_size"] = 8 // ranks
            (root / "kills.json").write_text(json.dumps(kills or []))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(supervisor, "WORKER", "tests.launcher.witness")
                patch.setenv("FROSTLINE_WITNESS", str(root))
                patch.setenv("OMP_NUM_THREADS", "1")
                patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))
                path = write_recipe_file(root / "recipe.yaml", content)
                run = launch(str(path), [], Hosts(ranks), max_restarts=len(kills or []), say=lambda _: None)
            assert run is not None
            assert len(list(root.glob("killed-*"))) == len(kills or []), "not every kill came about"
            done[name] = run
        return done[name]

    return start


def recipe(root: Path, dropout: float, **changes: Any) -> dict[str, Any]:
    """Two epochs of 12 batches of 8 on a model of four blocks."""
    config = make_model(root / "model") / "config.json"
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    config.write_text(json.dumps({**json.loads(config.read_text()), **rates}))
    make_data(root / "data")
    content = recipe_content(root, freeze=RAMP, threads=1, **changes)
    content["training"] |= {"logging_steps": 1, "per_device_eval_batch_size": 4}
    return content


def losses(run: Path) -> dict[int, float]:
    """By samples trained on."""
    return {event["samples"]: event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "loss"}


def trained_on(run: Path) -> list[Counter[str]]:
    """Each epoch's samples; of steps that were taken again after a kill, only the last time."""
    parts: dict[tuple[int, int, int, int], list[str]] = {}
    for path in run.parent.glob("rows-*.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            parts[path.name, entry["batch"], entry["step"]] = [str(row) for row in entry["rows"]]  # type: ignore[index]
    steps = ROWS["train"] // 8
    epochs: list[Counter[str]] = [Counter(), Counter()]
    for (_, batch, step), rows in parts.items():
        per_epoch = -(-steps * 8 // batch)
        epochs[step // per_epoch].update(rows)
    return epochs


def weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def test_efficiency_packing_is_the_same_training_on_fewer_ranks(launched: Launched) -> None:
    packed, whole = launched(2, "efficiency"), launched(2, "none")
    assert [(entry.ranks, entry.batch) for entry in account(packed)] == [(2, 8), (1, 8)]
    stages = Stages.read(packed)
    assert stages is not None
    assert (stages.current.samples, stages.current.depth) == (72, 1)
    assert losses(packed) == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(whole)) == 24
    there = weights(whole)
    for name, value in weights(packed).items():
        assert (value - there[name]).abs().max() < 1e-5, name
    summaries = [json.loads((run / "summary.json").read_text()) for run in (packed, whole)]
    assert summaries[0]["trajectory"] == summaries[1]["trajectory"]
    assert summaries[0]["metrics"] == pytest.approx(summaries[1]["metrics"], abs=1e-4)
    assert summaries[0]["samples"] == 2 * ROWS["train"]


@pytest.mark.slow
def test_four_ranks_become_two_and_then_one(launched: Launched) -> None:
    """What a rank may take lets the first move halve the ranks, and the second halve them again."""
    there = Stages.read(launched(4, "efficiency"))
    assert there is not None
    assert there.job is not None
    peaks = there.job.peaks
    cap = max(peaks[0][0], peaks[1][1], peaks[2][3])
    assert cap < peaks[1][3], "one rank fits at depth 1: the test shows nothing"
    packed, whole = launched(4, "efficiency", memory=cap), launched(4, "none")
    assert [(entry.ranks, entry.batch) for entry in account(packed)] == [(4, 8), (2, 8), (1, 8)]
    assert losses(packed) == pytest.approx(losses(whole), abs=1e-5)
    assert len(losses(packed)) == 24
    other = weights(whole)
    assert all((value - other[name]).abs().max() < 1e-5 for name, value in weights(packed).items())
    first, second = trained_on(packed)
    assert first == second
    assert first.total() == ROWS["train"]


@pytest.mark.parametrize("arguments", [(2, "none"), (2, "efficiency"), (2, "performance")], ids=str)
def test_every_sample_once_an_epoch(launched: Launched, arguments: tuple[int, str]) -> None:
    first, second = trained_on(launched(*arguments, **({"largest": 5} if "performance" in arguments else {})))
    assert first == second
    assert first.total() == ROWS["train"]


def test_performance_packing_takes_larger_batches(launched: Launched) -> None:
    run = launched(2, "performance", largest=5)
    assert [(entry.ranks, entry.batch) for entry in account(run)] == [(2, 8), (2, 40)]
    summary = json.loads((run / "summary.json").read_text())
    # 9 batches of 8; what is left of the epoch, 24; 40, 40 and 16.
    assert (summary["steps"], summary["samples"]) == (13, 192)
    assert list(losses(run)) == [*range(8, 80, 8), 96, 136, 176, 192]
    rates = {e["samples"]: e["learning_rate"] for e in read_events(run / "events.jsonl") if e["event"] == "loss"}
    # Linear to zero in samples, as it was, times the root of how much larger the batch is. The schedule now counts six
    # steps, three for each epoch.
    assert rates[72] == pytest.approx(1e-3 * (1 - 8 / 24))
    assert rates[96] == pytest.approx(5**0.5 * 1e-3 * (1 - 9 / 24))
    assert rates[136] == pytest.approx(5**0.5 * 1e-3 * (1 - 3 / 6))
    assert rates[176] == pytest.approx(5**0.5 * 1e-3 * (1 - 4 / 6))


def test_ranks_that_are_killed_change_nothing(launched: Launched) -> None:
    """Before there are stages, while they train, when the next one has been chosen, and while it is being made."""
    kills = [
        {"at": "claimed", "rank": 0},
        {"at": 24, "rank": 1},
        {"at": "look", "rank": 0},
        {"at": "carried", "rank": 0},
        {"at": "listed", "rank": 1},
        {"at": 160, "rank": 0},
    ]
    killed, whole = launched(2, "efficiency", dropout=0.1, kills=kills), launched(2, "efficiency", dropout=0.1)
    assert losses(killed) == losses(whole)
    there = weights(whole)
    assert all(value.equal(there[name]) for name, value in weights(killed).items())
    assert trained_on(killed) == trained_on(whole)
    looks = [
        [event for event in read_events(run / "events.jsonl") if event["event"] == "packing"] for run in (killed, whole)
    ]
    assert len(looks[0]) == len(looks[1]) == 2


@pytest.mark.faults
@pytest.mark.parametrize("draw", range(4))
def test_ranks_that_are_killed_at_twenty_points(draw: int, launched: Launched) -> None:
    """Five in each run; in the last two with records on disk, which are being written when the kill comes."""
    chosen = random.Random(draw)
    kills: list[dict[str, Any]] = [
        {"at": at, "rank": chosen.randrange(2 if at < 72 else 1)} for at in chosen.sample(range(8, 192, 8), 4)
    ]
    kills.append({"at": ("look", "saved", "carried", "listed")[draw], "rank": int(draw == 3)})
    settings: dict[str, Any] = {"dropout": 0.1, "cache": "disk" if draw > 1 else "off"}
    killed, whole = launched(2, "efficiency", kills=kills, **settings), launched(2, "efficiency", **settings)
    # A record is read where it was computed before, and rounding differs.
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-4 if draw > 1 else 0)
    assert trained_on(killed) == trained_on(whole)


def test_two_hosts_meet_and_one_leaves(tmp_path: Path) -> None:
    """Two agents of one rank each, with their own caches; the second stage needs one of them."""
    content = recipe(tmp_path, 0.0, pack={**PACK, "mode": "efficiency"}, cache={"mode": "disk"})
    content["training"]["per_device_train_batch_size"] = 4
    path = write_recipe_file(tmp_path / "recipe.yaml", content)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        sys.executable, "-c", "from frostline.cli import main; main()", "launch", str(path), "--nnodes", "2",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two-hosts",
    ]  # fmt: skip
    hosts = [
        subprocess.Popen(
            command,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
                "XDG_CACHE_HOME": str(tmp_path / f"cache-{host}"),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    said = [host.communicate(timeout=180)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    assert sum("this host is not needed any more" in words for words in said) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (24, 192)


def test_a_step_is_timed_where_the_line_has_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that costs something is looked at some steps after the line has moved: at 72 and 144 samples."""
    monkeypatch.setattr(staging, "_SETTLE", 4)
    for name, restart, looked in (("free", 0, [72, 144]), ("dear", 1e9, [104, 176])):
        root = tmp_path / name
        root.mkdir()
        content = recipe(root, 0.0, pack={**PACK, "mode": "performance", "largest": 1, "restart": restart})
        content["training"]["per_device_train_batch_size"] = 8
        run_stage(Recipe.model_validate(content), Launch("once", 0, 1), started=time.time())
        events = read_events(root / "run" / "events.jsonl")
        assert [event["samples"] for event in events if event["event"] == "packing"] == looked, name


def test_a_worker_leaves_before_libraries_can_abort_it() -> None:
    code = (
        "import atexit, ctypes, os; from frostline.launcher import worker; atexit.register(print, 'python has ended');"
        "abort = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(lambda *_: os.abort());"
        "ctypes.CDLL(None).on_exit(abort, None); worker._leave(3)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (3, "python has ended\n"), found.stderr


def test_a_recipe_that_packs_is_launched(tmp_path: Path) -> None:
    content = recipe_content(tmp_path, pack={"mode": "efficiency"})
    with pytest.raises(ConfigError, match=r"pack\.mode=efficiency.*frostline launch"):
        run(Recipe.model_validate(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": {"policy": "none"}}, "freeze.policy=none does not go with pack.mode=efficiency"),
        ({"baseline": "full"}, "baseline=full is for frostline run"),
        ({"memory": {"budget": "1GiB"}}, "memory.budget does not go with"),
        ({"pack": {"mode": "efficiency", "memory": 1000}}, "pack.memory=1000: micro-batches of 8 take"),
    ],
)
def test_settings_that_packing_cannot_keep(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = {**recipe(tmp_path, 0.0, pack={**PACK, "mode": "efficiency"}), **changes}
    with pytest.raises(FrostlineError, match=message):
        run_stage(Recipe.model_validate(content), Launch("once", 0, 1), started=time.time())
    assert not (tmp_path / "run").exists(), "something was left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "1"), "--nproc-per-node=0"),
        ((1, "0"), "--nnodes=0"),
        ((1, "3:2"), "--nnodes=3:2"),
        ((1, "two"), "--nnodes=two"),
        ((1, "2"), "several hosts must meet.*--rdzv-endpoint"),
    ],
)
def test_hosts_that_cannot_be(arguments: tuple[int, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hosts.parse(*arguments)
