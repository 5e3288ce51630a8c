"""Reading ahead: the coming batches are looked at, and their records are there when they are asked for."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import frostline
from frostline.cache import slotstore, watched
from frostline.cache.disk import DiskStore
from frostline.cache.tiers import disk_of
from tests.adapters.hosts import Rows, bert, trainer_for
from tests.architectures import ARCHITECTURES
from tests.cache.records import assert_records, filled, key, prefix, value
from tests.cache.sides import ROWS, SAMPLES, batch_of

BERT = {a.name: a for a in ARCHITECTURES}["bert"]
EPOCHS = 4
PLAN: dict[str, Any] = {"steps_per_epoch": SAMPLES // ROWS, "epochs": EPOCHS, "batch_size": ROWS}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Of each look into a disk tier: whether it was ahead, and how many records it read."""
    seen: list[tuple[bool, int]] = []
    fetch = DiskStore._fetch

    def noted(self: DiskStore, wanted: Any, *hands: int) -> Any:
        if wanted:
            seen.append((threading.current_thread().name.startswith("frostline-ahead"), len(wanted)))
        return fetch(self, wanted, *hands)

    monkeypatch.setattr(DiskStore, "_fetch", noted)
    return seen


def ahead(reads: list[tuple[bool, int]], *, where: bool = True) -> int:
    return sum(count for was_ahead, count in reads if was_ahead == where)


# -- loaders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_batches_come_in_order_and_are_seen_one_ahead(length: int) -> None:
    seen: list[int] = []
    loader = watched(list(range(length)), seen.append)
    assert len(loader) == length
    for _ in range(2):
        seen.clear()
        for number, batch in enumerate(loader):
            assert batch == number
            assert seen == list(range(min(number + 2, length)))


def test_it_passes_for_the_loader_that_it_watches() -> None:
    loader = DataLoader(list(range(6)), batch_size=2)  # type: ignore[arg-type]
    ours = watched(loader, print)
    assert ours.batch_size == 2
    with pytest.raises(AttributeError):
        ours.no_such_thing  # noqa: B018
    assert [b.tolist() for b in pickle.loads(pickle.dumps(watched([torch.ones(1)], print)))] == [[1.0]]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    try:
        yield Accelerator(cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_loader_of_accelerate_knows_its_last_batch(accelerator: Accelerator) -> None:
    """It tells by being one batch ahead: going further ahead from outside would end accumulation too early."""
    prepared: Any = accelerator.prepare(DataLoader([torch.ones(1)] * 6, batch_size=2))  # type: ignore[arg-type]
    seen: list[Any] = []
    for _ in range(2):  # wrapped twice it is watched once
        assert watched(prepared, seen.append) is prepared
    assert isinstance(prepared, DataLoader)
    ends = []
    for number, _batch in enumerate(prepared):
        assert len(seen) == min(number + 2, 3)
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert ends == [False, False, True]


def test_the_loaders_own_iterator_is_made_at_once() -> None:
    """What it draws or agrees on with other ranks must happen even where nobody asks for a batch (a dispatcher)."""
    made: list[int] = []

    class Loader:
        def __iter__(self) -> Iterator[int]:
            made.append(1)
            return iter([1, 2])

    ours = watched(Loader(), print)
    batches = iter(ours)
    assert made == [1]
    assert list(batches) == [1, 2]


# -- the store -----------------------------------------------------------------------------------------------


def test_what_was_expected_is_read_once_and_ahead(tmp_path: Path, reads: list[tuple[bool, int]]) -> None:
    store = filled(tmp_path / "a")
    for _ in range(2):  # said twice, read once
        store.expect([key(n) for n in range(15)] + [key(99)])
    assert_records(store, 20, 1)
    assert ahead(reads) == 15
    assert ahead(reads, where=False) == 5
    assert_records(store, 20, 1)
    assert ahead(reads, where=False) == 25
    store.close()


def test_a_record_written_over_after_it_was_read_ahead_is_read_again(tmp_path: Path) -> None:
    store = filled(tmp_path / "a")
    store.expect([key(n) for n in range(20)])
    for number in range(20):
        store.put(key(number), 2, value(number, 2))
    store.flush()
    assert_records(store, 20, 2)
    store.expect([key(n) for n in range(20)])
    store.clear()
    assert store.get_many([key(3)]) == [None]
    store.close()


def test_a_damaged_record_that_was_expected_is_not_used(tmp_path: Path) -> None:
    store = filled(tmp_path / "a")
    data = tmp_path / "a" / "slots.bin"
    content = bytearray(data.read_bytes())
    content[store._entries[key(3)].slot.offset + 140] ^= 1
    data.write_bytes(content)
    store.expect([key(n) for n in range(20)])
    found = store.get_many([key(n) for n in range(20)])
    assert [n for n, record in enumerate(found) if record is None] == [3]
    assert store.torn == 1
    store.close()


def test_what_nobody_asks_for_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "a")
    monkeypatch.setattr(slotstore, "_AHEAD", 3 * value(4, 1).nbytes)
    for number in range(20):
        store.expect([key(number)])
    assert 0 < len(store._coming) == len(store._announced) <= 7
    assert sum(store._announced.values()) <= slotstore._AHEAD
    store.expect([key(n) for n in range(20)])  # more than may be read ahead at all
    assert_records(store, 20, 1)
    assert not store._coming
    assert not store._announced
    store.moved(0)
    assert store.get_many([key(n) for n in range(20)]) == [None] * 20
    store.close()


def test_closing_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "a", 1 << 20, prefix=prefix)
    store.put(key(0), 1, value(0, 1))
    store.flush()
    store.expect([key(0)])
    store.close()
    assert not (tmp_path / "a").exists()


# -- runs ----------------------------------------------------------------------------------------------------


class Renaming(nn.Module):
    """Is called with other inputs than the loader yields."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**{**batch, "attention_mask": batch["attention_mask"].float()})


def loop(folder: Path, *, watch: bool, renaming: bool = False) -> tuple[list[float], frostline.Summary]:
    model = BERT.build()
    run: nn.Module = Renaming(model) if renaming else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cache = {"mode": "disk", "memory": 0, "folder": folder}
    frost = frostline.Frostline(model, optimizer, policy="static", depth=2, cache=cache, **PLAN)
    batches = [batch_of(BERT, list(range(i, i + ROWS))) for i in range(0, SAMPLES, ROWS)]
    losses = []
    for epoch in range(EPOCHS):
        for step, batch in enumerate(frost.loader(batches) if watch else batches):
            model.train()
            transformers.set_seed(100 * epoch + step)
            loss = run(**batch).loss
            loss.backward()
            frost.before_step()
            optimizer.step()
            optimizer.zero_grad()
            frost.after_step()
            losses.append(float(loss.detach()))
            disk_of(frost.cache.store).flush()  # type: ignore[union-attr]
    frost.finish()
    return losses, frost.summary()


def test_a_plain_loop_reads_ahead(tmp_path: Path, reads: list[tuple[bool, int]]) -> None:
    expected, _ = loop(tmp_path / "a", watch=False)
    assert ahead(reads) == 0
    assert ahead(reads, where=False) == (EPOCHS - 1) * SAMPLES
    reads.clear()
    losses, summary = loop(tmp_path / "b", watch=True)
    assert losses == expected
    assert summary["cache"]["hits"] == (EPOCHS - 1) * SAMPLES
    # Each epoch has a loader of its own here, whose first batch is asked for at once; it is waited for.
    assert ahead(reads) == (EPOCHS - 1) * SAMPLES
    assert ahead(reads, where=False) == 0


def test_other_inputs_than_the_loaders_are_said_and_end_it(tmp_path: Path, reads: list[tuple[bool, int]]) -> None:
    losses, summary = loop(tmp_path / "a", watch=True, renaming=True)
    assert losses == pytest.approx(loop(tmp_path / "b", watch=False)[0], rel=1e-5)
    assert "the loader yields other inputs than the model gets: nothing is read ahead" in summary["limits"]
    assert ahead(reads) == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"dataloader_num_workers": 1}, {"gradient_accumulation_steps": 8}],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_a_trainer_reads_ahead(changes: dict[str, Any], tmp_path: Path, reads: list[tuple[bool, int]]) -> None:
    found = []
    for cache in ("off", {"mode": "disk", "memory": 0, "folder": tmp_path / "cache"}):
        transformers.set_seed(3)
        trainer = trainer_for(
            tmp_path / "run",
            bert(dropout=0.1),
            rows=Rows(64, ragged=True),
            num_train_epochs=4,
            logging_steps=1,
            **changes,
        )
        frost = frostline.attach(trainer, "static", cache, depth=2)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=2e-2 if "bf16" in changes else 1e-4)
    summary = frost.summary()
    assert not summary["limits"]
    read = ahead(reads) + ahead(reads, where=False)
    assert read == summary["cache"]["hits"] > 64
    # Until the first batch with padding has shown that it is safe, the names are others.
    assert ahead(reads) > 0.9 * read
