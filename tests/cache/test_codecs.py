"""Codecs: what they cost in precision is within what they declare, measured and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from frostline.cache import CacheOptions
from frostline.cache.codecs import CODECS
from tests.cache.runs import BY_NAME, EPOCH, flush, pair, train
from tests.cache.sides import SAMPLES

# Largest error of a value, relative to the largest of its token.
DECLARED = {"raw": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.5 / 127}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("line", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 7), (2, 3, 4, 4)])
def test_what_comes_back(name: str, line: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(line)
    value[0] *= 300
    value[-1] = 0
    codec = CODECS[name]
    kept = codec.encode(value)
    back = codec.decode(kept, line)
    assert back.dtype == line
    assert kept.shape[:-1] == value.shape[:-1], "a record is cut by tokens"
    error = (back.double() - value.double()).abs().amax(-1)
    largest = value.double().abs().amax(-1)
    assert (error <= (DECLARED[name] + (2**-8 if line == torch.bfloat16 else 1e-6)) * largest).all()
    assert torch.equal(codec.decode(torch.zeros_like(kept), line), torch.zeros_like(value)), "padding stays zero"
    assert codec.lossy == (name != "raw")
    assert torch.equal(codec.decode(codec.encode(back), line), back) or name == "int8"


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "convnext", "vit"])
@pytest.mark.parametrize("name", ["bf16", "fp16", "int8"])
def test_training_with_it(architecture: str, name: str) -> None:
    cached, plain = pair(BY_NAME[architecture], options=CacheOptions(mode="memory", codec=name))
    expected, losses = train(plain, EPOCH * 3), train(cached, EPOCH * 3)
    assert not cached.limits
    assert losses[: len(EPOCH)] == pytest.approx(expected[: len(EPOCH)], rel=1e-5), "what is computed is not rounded"
    assert losses != pytest.approx(expected, rel=1e-9), "a lossy codec that loses nothing was not used"
    assert losses == pytest.approx(expected, rel=2e-2)
    assert cached.counts()["hits"] == 2 * SAMPLES
    (check,) = [e for e in cached.events if e["action"] == "check"]
    assert check["codec"] == name
    assert 0 < check["error"] < 0.01
    assert 0 < check["error_output"] < 0.1


def test_records_take_the_bytes_that_the_codec_says() -> None:
    taken = {}
    for name in CODECS:
        cached, _ = pair(options=CacheOptions(mode="memory", codec=name))
        train(cached, EPOCH)
        assert cached.cache is not None
        taken[name] = cached.cache.store.nbytes
    assert taken["bf16"] == taken["fp16"] == taken["raw"] / 2
    assert taken["int8"] == taken["raw"] / 4 * (32 + 4) / 32


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_on_disk(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": "disk", "memory": 0, "folder": tmp_path, "codec": name}
    cached, plain = pair(options=CacheOptions(**options))
    expected = train(plain, EPOCH * 2)
    losses = train(cached, EPOCH)
    flush(cached)
    assert losses + train(cached, EPOCH, 3) == pytest.approx(expected, rel=2e-2)
    assert cached.counts()["hits"] == SAMPLES
    assert cached.cache is not None
    cached.cache.close()


def test_what_does_not_fit_is_refused() -> None:
    cached, plain = pair(options=CacheOptions(mode="memory", codec="fp16"))
    for side in (cached, plain):
        block = side.stack.blocks[1]
        block.register_forward_hook(
            lambda _m, _a, out: (out[0] * 1e6, *out[1:]) if isinstance(out, tuple) else out * 1e6
        )
    assert train(cached, EPOCH) == pytest.approx(train(plain, EPOCH), rel=1e-5)
    assert cached.limits == ["cache-check: caching stopped: the boundary activation at depth 2 does not fit into fp16"]


def test_an_upgrade_starts_from_what_was_kept() -> None:
    cached, plain = pair(depth=1, options=CacheOptions(mode="memory", codec="bf16"))
    expected, losses = train(plain, EPOCH), train(cached, EPOCH)
    for side in (cached, plain):
        side.freeze(3)
    expected += train(plain, EPOCH * 2, 3)
    losses += train(cached, EPOCH * 2, 3)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert (cached.counts()["upgrades"], cached.counts()["hits"]) == (SAMPLES, SAMPLES)
