"""Law 3: a cached step computes what the uncached one computes, over the whole architecture matrix.

Equality alone would also hold with the cache switched off, so each test asserts the hits, the records written and
that the skipped blocks did not run.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from frostline.cache import CacheOptions
from frostline.cache.tiers import disk_of
from tests.architectures import ARCHITECTURES, Architecture
from tests.cache.sides import ROWS, SAMPLES, Side, batch_of, calls
from tests.laws.test_law1_checkpointing import CHECKPOINTED, checkpoint

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within 1e-5 of the largest gradient of the model: a key's bias has pure rounding noise for a gradient."""
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        worst = float((ours[name] - gradient).abs().max())
        assert worst <= 1e-5 * scale, f"{name}: {worst:.1e} against {scale:.1e}"


def epochs(seed: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(SAMPLES, generator=generator).tolist() for _ in range(count)]
    return [rows[i : i + ROWS] for rows in order for i in range(0, SAMPLES, ROWS)]


def assert_same_step(cached: Side, plain: Side, batch: dict[str, Tensor], number: int) -> None:
    """Both sides compute the same; then the cached one takes over what the other has learned."""
    loss, gradients = cached.step(batch, number)
    expected, reference = plain.step(batch, number)
    assert not cached.limits
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradients, reference)
    plain.optimizer.step()
    cached.follow(plain)


@every_architecture
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_teacher_forced(architecture: Architecture, depth: int) -> None:
    cached, plain = Side(architecture, cached=True), Side(architecture, cached=False)
    for side in (cached, plain):
        side.freeze(depth)
    batches = epochs(1, 3)
    for number, rows in enumerate(batches):
        batch = batch_of(architecture, rows)
        with calls(cached.stack) as ran:
            loss, gradients = cached.step(batch, number)
        with calls(plain.stack) as ran_plain:
            expected, reference = plain.step(batch, number)
        assert not cached.limits
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_close(gradients, reference)
        if number >= SAMPLES // ROWS:
            # Layer drop may leave out an active block; DeBERTa runs a shared projection twice.
            assert all(ran_plain[i] > 0 for i in range(depth))
            assert ran == Counter({i: n for i, n in ran_plain.items() if i >= depth})
        plain.optimizer.step()
        cached.follow(plain)
    counts = cached.counts()
    assert counts["written"] == counts["misses"] == SAMPLES
    assert counts["hits"] == 2 * SAMPLES


@every_architecture
def test_from_disk_read_ahead(architecture: Architecture, tmp_path: Path) -> None:
    """Written at depth 1, upgraded to 2 and read, each batch announced before it comes."""
    options = CacheOptions(mode="disk", memory=0, folder=tmp_path)
    cached, plain = Side(architecture, cached=True, options=options), Side(architecture, cached=False)
    assert cached.cache is not None
    for number, rows in enumerate(epochs(1, 3)):
        for side in (cached, plain):
            side.freeze(1 if number < SAMPLES // ROWS else 2)
        batch = batch_of(architecture, rows)
        cached.cache.expect(batch)
        assert_same_step(cached, plain, batch, number)
        disk = disk_of(cached.cache.store)
        assert disk is not None
        disk.flush()
    counts = cached.counts()
    assert (counts["misses"], counts["upgrades"], counts["hits"]) == (SAMPLES, SAMPLES, SAMPLES)
    cached.cache.close()


@every_architecture
def test_mixed_depths_in_one_batch(architecture: Architecture) -> None:
    """Rows with records at depths 1, 2 and 3 and rows without any, in the same batch."""
    cached, plain = Side(architecture, cached=True), Side(architecture, cached=False)
    for step, (depth, rows) in enumerate(
        ((1, [0, 1, 2, 3]), (2, [2, 3, 4, 5]), (3, [3, 4, 6, 7]), (3, [0, 3, 5, 8]), (3, [0, 5, 8, 3]))
    ):
        for side in (cached, plain):
            side.freeze(depth)
        batch = batch_of(architecture, rows)
        assert_same_step(cached, plain, batch, step)
    counts = cached.counts()
    # Misses: 0-3, 4-5, 6-7, 8. Upgrades: 2, 3 to 2; 3, 4 to 3; 0 (from 1) and 5 (from 2) to 3. Hits: 3; then all.
    assert (counts["misses"], counts["upgrades"], counts["hits"]) == (9, 6, 5)
    assert counts["written"] == 15


@every_architecture
def test_free_running(architecture: Architecture) -> None:
    """On their own, losses stay within 1e-5 for 102 steps that see every sample often, while the line moves."""
    losses = []
    for is_cached in (True, False):
        side = Side(architecture, cached=is_cached)
        history = []
        for number, rows in enumerate(epochs(2, 34)):
            side.freeze(min(3, number // 20))
            history.append(side.step(batch_of(architecture, rows), number)[0])
            nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
            side.optimizer.step()
        if is_cached:
            assert not side.limits
            assert side.counts()["hits"] > 200
            assert side.counts()["upgrades"] > 0
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("architecture", CHECKPOINTED, ids=repr)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("depth", [1, 2])
def test_gradient_checkpointing(architecture: Architecture, depth: int, reentrant: bool) -> None:
    """Active blocks are recomputed from what they were given; frozen ones are not run at all."""
    cached, plain = Side(architecture, cached=True), Side(architecture, cached=False)
    for side in (cached, plain):
        checkpoint(side.model, reentrant=reentrant)
        side.freeze(depth)
    for number, rows in enumerate(epochs(1, 2)):
        batch = batch_of(architecture, rows)
        loss, gradients = cached.step(batch, number)
        expected, reference = plain.step(batch, number)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_close(gradients, reference)
        plain.optimizer.step()
        cached.follow(plain)
    if architecture.name == "deberta-v2" and depth == 1:
        (limit,) = cached.limits
        assert "something between blocks 0 and 1 works on the hidden state" in limit
    else:
        assert not cached.limits
        assert cached.counts()["hits"] == SAMPLES
