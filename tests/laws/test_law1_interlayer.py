"""Laws 1 and 4 for a policy that changes its mind at every step."""

from __future__ import annotations

import copy

import pytest
import torch

from frostline import Frostline
from frostline.errors import ModelError
from frostline.memory import saved as saved_tensors
from tests.architectures import ARCHITECTURES, Architecture
from tests.laws.loops import OPTIMIZERS, Loop, moved, parameters

BY_NAME = {a.name: a for a in ARCHITECTURES}
STEPS = 8


class Job:
    """A model that trains under policy interlayer."""

    def __init__(
        self, architecture: Architecture, optimizer: str = "adamw", memory: str = "off", **options: object
    ) -> None:
        self.architecture = architecture
        self.model = architecture.build()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.frost = Frostline(
            self.model, self.optimizer, policy="interlayer", memory=memory, steps_per_epoch=STEPS, epochs=1,
            blocks=architecture.path, **{"share": 0.7, **options},
        )  # fmt: skip

    def step(self, loop: Loop | None = None) -> float:
        """One step; the batch and the random numbers depend on how many there were."""
        torch.manual_seed(self.frost.step)
        batch = self.architecture.inputs(seed=self.frost.step)
        self.model.train()
        loss = self.model(**batch).loss
        loss.backward()
        self.frost.before_step()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.frost.after_step()
        return float(loss.detach())

    @property
    def resting(self) -> frozenset[str]:
        return self.frost.freezer.decision.resting


_PAIRS = [(a, "adamw") for a in ARCHITECTURES] + [(BY_NAME["bert"], o) for o in OPTIMIZERS if o != "adamw"]


@pytest.mark.parametrize("within", ["kind", "model"])
@pytest.mark.parametrize(("architecture", "optimizer"), _PAIRS, ids=[f"{a.name}-{o}" for a, o in _PAIRS])
def test_what_rests_does_not_move_and_what_trains_does(architecture: Architecture, optimizer: str, within: str) -> None:
    job = Job(architecture, optimizer, within=within)
    seen: set[frozenset[str]] = set()
    for _ in range(STEPS):
        resting, before = job.resting, parameters(job.model)
        seen.add(resting)
        job.step()
        changed = moved(before, parameters(job.model))
        assert not changed & resting
        assert changed - resting, "nothing trained"
    # Among few of a kind the one that moves most may do so at every step.
    assert len(seen) > (STEPS // 2 if within == "model" else 1), "the policy did not change its mind"
    trained = set(job.frost.policy.distances)  # type: ignore[attr-defined]
    assert len(trained) >= 0.9 * len(job.frost.policy.layers)  # type: ignore[attr-defined]
    job.frost.finish()
    assert all(p.requires_grad for n, p in job.model.named_parameters() if n in job.frost.plan.layer_paths)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=repr)
def test_below_a_line_nothing_moves(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks under the frost line are frozen, layers above it take turns, and what is saved is compressed."""
    monkeypatch.setattr(saved_tensors, "SMALL", 2)
    job = Job(architecture, memory="slimfit", share=0.5, line={"policy": "ramp", "start": 0.0, "level": 0.5})
    depths = set()
    for _ in range(STEPS):
        job.step()
        depths.add(job.frost.depth)
    assert depths == {0, len(job.frost.stack) // 2}
    before = parameters(job.model)
    for _ in range(3):
        below = set(job.frost.stack.prefix_parameters(job.frost.depth))
        assert below
        resting = job.resting
        job.step()
        changed = moved(before, parameters(job.model))
        before = parameters(job.model)
        assert not changed & (below | resting)
        assert changed
    assert job.frost.summary()["memory"]["kept"] > 0


@pytest.mark.parametrize("moments", ["keep", "drop"])
def test_moments_of_resting_layers_are_kept_or_dropped(moments: str) -> None:
    job = Job(BY_NAME["bert"], moments=moments)
    for _ in range(STEPS):
        job.step()
    named = dict(job.model.named_parameters())
    kept = [name for name in job.resting if job.optimizer.state.get(named[name])]
    assert (len(kept) > 0) == (moments == "keep")


RISING = {"policy": "ramp", "start": 0.0, "level": 0.5, "evaluations_per_epoch": 4}


@pytest.mark.parametrize("line", [None, RISING], ids=["line at 0", "line rises"])
@pytest.mark.parametrize("memory", ["off", "slimfit"])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(
    at: int, memory: str, line: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_tensors, "SMALL", 2)
    whole = Job(BY_NAME["bert"], memory=memory, line=line)
    losses = [whole.step() for _ in range(STEPS)]
    assert (whole.frost.depth > 0) == (line is not None)
    first = Job(BY_NAME["bert"], memory=memory, line=line)
    for _ in range(at):
        first.step()
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.frost.state_dict()))
    second = Job(BY_NAME["bert"], memory=memory, line=line)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.frost.load_state_dict(saved[2])
    assert [second.step() for _ in range(STEPS - at)] == losses[at:]
    assert not moved(parameters(whole.model), parameters(second.model))
    assert second.resting == whole.resting


def test_a_move_that_is_refused_changes_nothing_of_what_rests() -> None:
    job = Job(BY_NAME["bert"], share=0.5, within="model", line=RISING, max_depth_changes=0)
    for _ in range(STEPS):
        job.step()
        assert job.frost.depth == 0
        assert len(job.resting) == len(job.frost.policy.layers) // 2  # type: ignore[attr-defined]


def test_a_step_that_the_scaler_skips_records_nothing() -> None:
    job = Job(BY_NAME["bert"])
    job.step()
    distances, resting = dict(job.frost.policy.distances), job.resting  # type: ignore[attr-defined]
    job.model(**job.architecture.inputs()).loss.backward()
    job.frost.before_step()
    job.optimizer.zero_grad()  # a scaler that found an overflow does not call step()
    job.frost.after_step()
    assert job.frost.policy.distances == distances  # type: ignore[attr-defined]
    assert job.resting == resting


def test_a_layer_that_is_not_used_does_not_stop_the_others() -> None:
    """It counts as visited; with one layer that trains it would else be chosen for ever."""
    job = Job(BY_NAME["llama-classes"], share=0.9)
    unused = job.frost.policy.layers[0]  # type: ignore[attr-defined]
    named = dict(job.model.named_parameters())
    for _ in range(30):
        job.model.train()
        job.model(**job.architecture.inputs(seed=job.frost.step)).loss.backward()
        named[unused].grad = None
        job.frost.before_step()
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.frost.after_step()
    assert set(job.frost.policy.distances) == set(job.frost.policy.layers)  # type: ignore[attr-defined]
    assert job.frost.policy.distances[unused] == 0.0  # type: ignore[attr-defined]


def test_a_loop_that_never_calls_before_step_is_told_so() -> None:
    """A distance of nothing for what was not measured would let the same layers train for ever."""
    job = Job(BY_NAME["bert"])
    for _ in range(3):
        job.model(**job.architecture.inputs()).loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.frost.after_step()
    assert not job.frost.policy.distances  # type: ignore[attr-defined]
    (limit,) = job.frost.summary()["limits"]
    assert "without before_step()" in limit
    job.step()
    assert job.frost.policy.distances  # type: ignore[attr-defined]


def test_a_hundred_decisions_are_one_line_of_the_log() -> None:
    job = Job(BY_NAME["plain"])
    for _ in range(101):
        job.step()
    decisions = [event for event in job.frost.log.events if event["event"] == "decision"]
    assert [event["evaluation"] for event in decisions] == [100]


def test_a_compiled_model_is_refused() -> None:
    model = BY_NAME["bert"].build()
    with pytest.raises(ModelError, match="compiled"):
        Frostline(torch.compile(model), None, policy="interlayer", steps_per_epoch=1, epochs=1)
    model = BY_NAME["bert"].build()
    model.bert.encoder.layer[1].compile()
    with pytest.raises(ModelError, match="compiled model, or block"):
        Frostline(model, None, policy="interlayer", steps_per_epoch=1, epochs=1)
