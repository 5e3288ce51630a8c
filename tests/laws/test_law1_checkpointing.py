"""Law 1 under gradient checkpointing: a frozen prefix is never recomputed, active blocks keep their gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.architectures import ARCHITECTURES, Architecture
from tests.laws.loops import Run, crossing
from tests.laws.test_law1_frozen import check_frozen

DEPTH = 2

# What transformers itself refuses (MPNet, the convolutional networks) is not ours to test.
CHECKPOINTED = [a for a in ARCHITECTURES if getattr(a.build(), "supports_gradient_checkpointing", False)]
every_architecture = pytest.mark.parametrize("architecture", CHECKPOINTED, ids=repr)


def checkpoint(model: nn.Module, *, reentrant: bool) -> None:
    """Switch checkpointing on the way the Trainer does."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def gradients(architecture: Architecture, reentrant: bool | None, *, late: bool = False) -> dict[str, Tensor | None]:
    """Active gradients of one seeded step in train mode at DEPTH; ``late``: checkpointing is enabled after freezing."""
    run = Run(architecture)
    if reentrant is not None and not late:
        checkpoint(run.model, reentrant=reentrant)
    run.freeze(DEPTH)
    if reentrant is not None and late:
        checkpoint(run.model, reentrant=reentrant)
    run.model.train()
    transformers.set_seed(1)
    run.model(**architecture.inputs()).loss.backward()
    assert all(p.grad is None for p in run.stack.prefix_parameters(DEPTH).values())
    return {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), f"{name} got no gradient"
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@every_architecture
def test_non_reentrant_gives_the_gradients_of_the_plain_step(architecture: Architecture) -> None:
    assert_same(gradients(architecture, False), gradients(architecture, None))


@every_architecture
@pytest.mark.parametrize("late", [False, True], ids=["before-freezing", "after-freezing"])
def test_reentrant_is_mended(architecture: Architecture, late: bool) -> None:
    """Reentrant checkpointing gives a block whose input needs no gradient none at all, with a warning only."""
    assert_same(gradients(architecture, True, late=late), gradients(architecture, None))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama-lm", "t5", "wav2vec2", "lora-bert"])
def test_prefix_does_not_move(name: str, reentrant: bool) -> None:
    run = Run(next(a for a in CHECKPOINTED if a.name == name), "adamw")
    checkpoint(run.model, reentrant=reentrant)
    check_frozen(run)


@pytest.mark.parametrize("name", ["bert", "llama-classes"])
def test_input_require_grads_does_not_reach_into_the_prefix(name: str) -> None:
    """The usual mend for reentrant checkpointing asks for input gradients: the prefix must not pay for it."""
    run = Run(next(a for a in CHECKPOINTED if a.name == name))
    run.model.enable_input_require_grads()
    checkpoint(run.model, reentrant=True)
    check_frozen(run)
    for block in run.stack.blocks[1 : DEPTH + 1]:
        with crossing(block) as seen:
            run.model(**run.architecture.inputs())
        assert all(t.grad_fn is None for t in seen[0]), "the prefix built a graph"


@pytest.mark.parametrize("name", ["bert", "vit", "wav2vec2"])
def test_resting_stem_leaves_block_0_its_gradients(name: str) -> None:
    """At depth 0 with a resting stem (LISA) the input of block 0 may need no gradient."""
    architecture = next(a for a in CHECKPOINTED if a.name == name)
    found = []
    for reentrant in (None, True):
        run = Run(architecture)
        if reentrant:
            checkpoint(run.model, reentrant=True)
        run.freeze(0, *run.stack.paths_of("stem"))
        run.model.train()
        transformers.set_seed(1)
        run.model(**architecture.inputs()).loss.backward()
        found.append({n: p.grad for n, p in run.model.named_parameters() if p.requires_grad})
    assert_same(found[1], found[0])


def block_runs(architecture: Architecture, reentrant: bool | None) -> list[int]:
    """How often the first layer of each block ran in one step (some models use a layer twice in one forward pass)."""
    run = Run(architecture)
    if reentrant is not None:
        checkpoint(run.model, reentrant=reentrant)
    run.freeze(DEPTH)
    run.model.train()
    calls = [0] * len(run.stack)

    def count(index: int) -> None:
        calls[index] += 1

    for index, block in enumerate(run.stack.blocks):
        # Hooks of a block stay outside its checkpoint; those of a layer inside see the recomputation.
        layer = next(m for m in block.modules() if not list(m.children()) and list(m.parameters()))
        layer.register_forward_pre_hook(lambda *_, index=index: count(index))
    transformers.set_seed(2)
    run.model(**architecture.inputs()).loss.backward()
    return calls


@every_architecture
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_frozen_blocks_are_not_recomputed(architecture: Architecture, reentrant: bool) -> None:
    once, calls = block_runs(architecture, None), block_runs(architecture, reentrant)
    assert calls[:DEPTH] == once[:DEPTH], "a frozen block was recomputed"
    assert calls[DEPTH:] == [2 * n for n in once[DEPTH:]], "an active block was not recomputed"
