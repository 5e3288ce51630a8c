"""Laws 6 and 7: the cache can only help, and what is random is not cached."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from frostline.cache import CacheOptions
from frostline.cache.cost import Cost
from frostline.cache.store import MemoryStore, Record
from tests.architectures import Architecture
from tests.cache.runs import BERT, BY_NAME, EPOCH, both, hooks, pair, train
from tests.cache.sides import ROWS, SAMPLES, Side, batch_of, calls
from tests.conftest import MEASURED
from tests.laws.loops import installed


def test_a_thaw_forgets_deeper_records_and_uses_the_others() -> None:
    cached, plain = pair(depth=1)
    both(cached, plain, EPOCH[:1])
    for side in (cached, plain):
        side.freeze(3)
    both(cached, plain, EPOCH[1:], 1)
    for side in (cached, plain):
        side.freeze(1)
    both(cached, plain, EPOCH * 2, 3)
    counts = cached.counts()
    assert counts["dropped"] == 2 * ROWS
    assert counts["hits"] == ROWS + SAMPLES
    assert counts["misses"] == SAMPLES + 2 * ROWS


@pytest.mark.parametrize("what", ["weight", "load", "buffer"])
def test_a_record_of_other_weights_is_not_used(what: str) -> None:
    """The prefix is changed behind the cache's back: by hand, by loading a checkpoint, in a BatchNorm buffer."""
    cached, plain = pair(BY_NAME["resnet"])
    both(cached, plain, EPOCH)
    for side in (cached, plain):
        if what == "load":
            state = side.model.state_dict()
            side.model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in state.items()})
        else:
            first = side.stack.blocks[0]
            tensors = first.parameters() if what == "weight" else (b for b in first.buffers() if b.is_floating_point())
            with torch.no_grad():
                next(iter(tensors)).add_(0.5)
    both(cached, plain, EPOCH, 3)
    assert cached.counts()["stale"] == SAMPLES
    assert cached.counts()["hits"] == 0
    both(cached, plain, EPOCH, 6)
    assert cached.counts()["hits"] == SAMPLES


def test_evaluation_never_sees_the_skip() -> None:
    cached, plain = pair()
    both(cached, plain, EPOCH)
    before = cached.cache.summary() if cached.cache else {}
    with torch.no_grad():
        for mode in (False, True):
            outputs = []
            for side in (cached, plain):
                side.model.train(mode)
                transformers.set_seed(0)
                with calls(side.stack) as ran:
                    outputs.append(side.model(**batch_of(BERT, EPOCH[0])).logits)
                assert set(ran) == {0, 1, 2, 3}
            assert outputs[0] == pytest.approx(outputs[1], rel=1e-4)
    assert cached.cache is not None
    assert cached.cache.summary() == before


def test_nothing_is_left_on_the_model() -> None:
    side = Side(BERT, cached=True)
    side.freeze(2)
    assert side.cache is not None
    frozen = installed(side.model)
    train(side, EPOCH * 2)
    assert side.counts()["hits"] == SAMPLES
    assert installed(side.model) == frozen, "a pass leaves the blocks as it found them"
    copied = copy.deepcopy(side.model)
    assert not any("forward" in vars(m) for m in copied.modules())
    side.cache.close()
    side.freezer.release()
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in side.model.modules())
    pickle.dumps(side.model)


def test_an_interrupt_in_a_pass_leaves_no_skip_behind() -> None:
    side = Side(BERT, cached=True)
    side.freeze(2)
    train(side, EPOCH)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = side.stack.blocks[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(side, EPOCH[:1], 3)
    handle.remove()
    side.model.eval()
    with calls(side.stack) as ran, torch.no_grad():
        side.model(**batch_of(BERT, EPOCH[0]))
    assert set(ran) == {0, 1, 2, 3}


class Augmented:
    """Inputs that are new each time."""

    @staticmethod
    def batch(architecture: Architecture, rows: list[int], number: int) -> dict[str, Tensor]:
        batch = batch_of(architecture, rows)
        batch["pixel_values"] = batch["pixel_values"] + number
        return batch


def test_inputs_that_never_repeat_stop_the_cache() -> None:
    vit = BY_NAME["vit"]
    cached, plain = pair(vit)
    for number, rows in enumerate(EPOCH * 3):
        batch = Augmented.batch(vit, rows, number)
        assert cached.step(batch, number)[0] == pytest.approx(plain.step(batch, number)[0], rel=1e-5)
    assert cached.cache is not None
    assert cached.cache.summary()["records"] == 0
    (limit,) = cached.limits
    assert limit.startswith("cache-no-hits: caching stopped: for a whole epoch no sample came by a second time")


def test_a_random_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that no eval mode switches off, below the line."""
    cached, plain = pair()
    for side in (cached, plain):
        original = side.stack.blocks[0].attention.forward

        def noisy(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            hidden, *rest = original(*args, **kwargs)
            return hidden + 0.1 * torch.randn_like(hidden), *rest

        monkeypatch.setattr(side.stack.blocks[0].attention, "forward", noisy)
    both(cached, plain, EPOCH * 2)
    (limit,) = cached.limits
    assert "differs from pass to pass" in limit
    assert cached.counts()["hits"] == cached.counts()["written"] == 0


def test_packed_batches_are_refused() -> None:
    cached, _ = pair()
    batch = batch_of(BERT, EPOCH[0])
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * ROWS)
    cached.step(batch, 0)
    assert "flattened batch" in cached.limits[0]


def test_inner_states_are_not_skipped() -> None:
    cached, _ = pair()
    train(cached, EPOCH)
    cached.model.train()
    with calls(cached.stack) as ran:
        output = cached.model(**batch_of(BERT, EPOCH[0]), output_hidden_states=True)
    assert set(ran) == {0, 1, 2, 3}
    assert len(output.hidden_states) == 5
    assert cached.limits  # from each module around the stack; the engine says it once
    assert all("no block is skipped" in limit for limit in cached.limits)
    assert cached.counts()["hits"] == 0


class Broken(MemoryStore):
    """Fails in its fourth read."""

    reads = 0

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        self.reads += 1
        if self.reads == 4:
            raise OSError("the memory has gone")
        return super().get_many(keys)


def test_a_failing_store_costs_the_cache_and_not_the_run() -> None:
    cached, plain = pair(store=Broken(1 << 20))
    both(cached, plain, EPOCH * 2)
    assert cached.limits == ["cache-error: caching stopped: OSError: the memory has gone"]


@pytest.mark.parametrize("records", [0, 5])
def test_what_does_not_fit_is_recomputed(records: int) -> None:
    size = torch.empty(8, 32).nbytes
    cached, plain = pair(store=MemoryStore(records * size))
    both(cached, plain, EPOCH * 3)
    counts = cached.counts()
    assert cached.cache is not None
    assert cached.cache.store.nbytes <= records * size
    assert counts["hits"] == 2 * cached.cache.store.records
    assert counts["full"] > 0
    assert records <= cached.cache.store.records <= records + 1  # padded samples are a little smaller


def ragged(rows: list[int], *, extra: int = 0) -> dict[str, Tensor]:
    """Rows of 4 to 7 tokens, padded to the longest of the batch and ``extra`` more."""
    whole = batch_of(BERT, list(range(SAMPLES)))
    lengths = [4 + row % 4 for row in rows]
    width = max(lengths) + extra
    ids, labels = whole["input_ids"][rows, :width].clone(), whole["labels"][rows]
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids.clamp_min(3) * mask), "attention_mask": mask, "labels": labels}


def test_records_hold_real_tokens_and_serve_any_padding() -> None:
    cached, plain = pair()
    for number, rows in enumerate([[0, 1, 2, 3], [0, 4, 8], [1, 5, 2], [3, 2, 1, 0]]):
        batch = ragged(rows)
        (loss, gradients), (expected, reference) = cached.step(batch, number), plain.step(batch, number)
        assert loss == pytest.approx(expected, rel=1e-5)
        scale = max(float(g.abs().max()) for g in reference.values())
        assert max(float((gradients[n] - reference[n]).abs().max()) for n in reference) <= 1e-5 * scale
    assert cached.counts()["hits"] == 1 + 2 + 4
    assert cached.cache is not None
    tokens = sum(4 + row % 4 for row in (0, 1, 2, 3, 4, 5, 8))
    assert cached.cache.store.nbytes == tokens * 32 * 4


def test_where_padding_reaches_real_tokens_its_length_joins_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cached, plain = pair()
    for side in (cached, plain):
        for index in (0, 3):
            side.model.bert.encoder.layer[index].forward = _mixing(side.model.bert.encoder.layer[index].forward)
    for number, (rows, extra) in enumerate([([0, 1, 2, 3], 0), ([0, 1], 0), ([0, 1, 2, 3], 0), ([3, 1, 2, 0], 0)]):
        batch = ragged(rows, extra=extra)
        assert cached.step(batch, number)[0] == pytest.approx(plain.step(batch, number)[0], rel=1e-5)
    assert {"action": "padding", "depth": 2, "safe": False} in cached.events
    assert not cached.limits
    assert cached.counts()["hits"] == 8


def _mixing(original: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        return out + out.mean(1, keepdim=True)

    return forward


@pytest.mark.parametrize("name", ["bert", "llama-classes", "t5"])
def test_autocast_in_the_loop(name: str) -> None:
    """Autocast keeps what it has cast: a check that casts the head without gradients must not cut the loss off."""
    cached, plain = pair(BY_NAME[name])
    for number, rows in enumerate(EPOCH * 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batch = batch_of(cached.architecture, rows)
            found = []
            for side in (cached, plain):
                side.model.train()
                side.optimizer.zero_grad()
                transformers.set_seed(number)
                found.append(side.model(**batch).loss)
        for loss in found:
            loss.backward()
        got, expected = (
            {n: p.grad for n, p in side.model.named_parameters() if p.grad is not None} for side in (cached, plain)
        )
        assert got.keys() == expected.keys()
        scale = max(float(g.abs().max()) for g in expected.values())
        assert max(float((got[n] - expected[n]).abs().max()) for n in expected) <= 2e-2 * scale
        assert found[0].item() == pytest.approx(found[1].item(), rel=1e-2)
        plain.optimizer.step()
        cached.follow(plain)
    assert not cached.limits
    assert cached.counts()["hits"] == SAMPLES


def test_a_buffer_written_over_with_its_own_value_keeps_the_records() -> None:
    """What DDP does with the buffers of every rank but the first, at each step."""
    cached, plain = pair(BY_NAME["resnet"])
    both(cached, plain, EPOCH)
    for number in range(2):
        for buffer in cached.model.buffers():
            buffer.copy_(buffer.clone())
        both(cached, plain, EPOCH, 3 + 3 * number)
    assert cached.counts()["hits"] == 2 * SAMPLES
    assert cached.counts()["stale"] == 0


def test_data_without_epochs_that_fill_the_memory_in_vain_end_it() -> None:
    vit = BY_NAME["vit"]
    options = CacheOptions(mode="auto", memory=3000)
    cached, plain = Side(vit, cached=True, options=options, sized=False), Side(vit, cached=False)
    for side in (cached, plain):
        side.freeze(2)
    for number, rows in enumerate(EPOCH * 3):
        batch = Augmented.batch(vit, rows, number)
        assert cached.step(batch, number)[0] == pytest.approx(plain.step(batch, number)[0], rel=1e-5)
    (limit,) = cached.limits
    assert limit.startswith("cache-no-hits: caching stopped: the data have no epochs")


class Late(MemoryStore):
    """As another rank's records, its own are there before a look has seen that a pass may enter at their depth."""

    looks = 0

    def depths(self) -> set[int]:
        self.looks += 1
        return set() if self.looks == 2 else super().depths()


def test_a_pass_enters_only_where_a_look_has_allowed_it() -> None:
    cached, plain = pair(depth=1, store=Late(1 << 20))
    both(cached, plain, EPOCH)
    for side in (cached, plain):
        side.freeze(3)
    both(cached, plain, EPOCH, 3)
    counts = cached.counts()
    assert (counts["misses"], counts["upgrades"]) == (SAMPLES + ROWS, SAMPLES - ROWS)
    assert not cached.limits


def test_a_weight_that_changes_just_before_the_line_moves_is_noticed() -> None:
    cached, plain = pair(depth=1)
    both(cached, plain, EPOCH)
    for side in (cached, plain):
        with torch.no_grad():
            side.model.bert.embeddings.word_embeddings.weight.mul_(1.5)
        side.freeze(2)
    both(cached, plain, EPOCH, 3)
    assert cached.counts()["stale"] == SAMPLES
    assert cached.counts()["upgrades"] == 0


def test_a_deeper_block_that_looks_at_padding_is_noticed_when_it_freezes() -> None:
    cached, plain = pair(depth=1)
    for side in (cached, plain):
        layer = side.model.bert.encoder.layer[1]
        layer.forward = _mixing(layer.forward)
    # Seen from depth 1 the mixing block is above the line, where empty padding would be mixed in: not safe either.
    for number, (depth, rows) in enumerate(
        [(1, [0, 1, 2, 3]), (1, [0, 1]), (2, [0, 1, 2, 3]), (2, [0, 4, 8]), (2, [4, 8])]
    ):
        for side in (cached, plain):
            side.freeze(depth)
        batch = ragged(rows)
        assert cached.step(batch, number)[0] == pytest.approx(plain.step(batch, number)[0], rel=1e-5)
    assert not cached.limits
    assert [e["safe"] for e in cached.events if e["action"] == "padding"] == [False]


def test_padding_is_looked_at_again_when_the_line_moves() -> None:
    cached, plain = pair(depth=1)
    for number, (depth, rows) in enumerate([(1, [0, 1, 2, 3]), (3, [3, 2, 1, 0]), (3, [0, 1])]):
        for side in (cached, plain):
            side.freeze(depth)
        batch = ragged(rows)
        assert cached.step(batch, number)[0] == pytest.approx(plain.step(batch, number)[0], rel=1e-5)
    assert [(e["depth"], e["safe"]) for e in cached.events if e["action"] == "padding"] == [(1, True), (3, True)]
    assert cached.counts()["upgrades"] == 4


def test_the_precision_joins_the_name_of_a_record() -> None:
    cached, _ = pair()
    for number, enabled in enumerate((False, True, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cached.step(batch_of(BERT, EPOCH[0]), number)
    assert cached.counts()["misses"] == 2 * ROWS
    assert cached.counts()["hits"] == ROWS


class Slow(MemoryStore):
    """Takes its time to read."""

    def get_many(self, keys: Sequence[bytes]) -> list[Record | None]:
        time.sleep(0.05)
        return super().get_many(keys)


def test_a_store_that_is_slower_than_computing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cost, "numbers", MEASURED)
    cached, plain = pair(store=Slow(1 << 20))
    both(cached, plain, EPOCH * 5)
    (limit,) = cached.limits
    assert limit.startswith("cache-slow: not cached at depth 2: reading a sample takes ")
    (cost,) = [e for e in cached.events if e["action"] == "cost"]
    assert cost["reading"] > cost["computing"] > 0
    assert cached.counts()["hits"] == 8 * ROWS
    assert cached.cache is not None
    assert cached.cache.store.records == 0
    # A resumed run takes the decision over, whether its state comes before or after it has frozen.
    state = json.loads(json.dumps(cached.cache.state_dict()))
    for first in (True, False):
        again, alone = Side(BERT, cached=True), Side(BERT, cached=False)
        assert again.cache is not None
        alone.freeze(2)
        if first:
            again.cache.load_state_dict(state)
        again.freeze(2)
        if not first:
            again.cache.load_state_dict(state)
        both(again, alone, EPOCH * 2)
        assert again.counts()["misses"] == 0
        assert hooks(again) == hooks(alone)
    # A deeper line saves more: it is measured anew.
    for side in (cached, plain):
        side.freeze(3)
    both(cached, plain, EPOCH * 2, 15)
    assert cached.counts()["hits"] == 8 * ROWS + SAMPLES
