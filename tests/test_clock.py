"""Steps, samples and epochs of a run."""

from __future__ import annotations

import math

import pytest

from frostline.clock import Clock
from frostline.errors import ConfigError


def test_every_epoch_has_the_same_samples_and_its_last_batch_is_smaller() -> None:
    clock = Clock(4, 2.5, 8, 29)
    seen = []
    for _ in range(9):
        clock.step += 1
        seen.append(clock.samples)
    assert seen == [8, 16, 24, 29, 37, 45, 53, 58, 66]


@pytest.mark.parametrize(("epochs", "left"), [(3, [2, 2, 1, 1, 0, 0]), (2.5, [2, 2, 1, 1, 0, 0]), (1, [0, 0])])
def test_epochs_that_will_bring_a_sample_back(epochs: float, left: list[int]) -> None:
    clock = Clock(2, epochs)
    found = []
    for _ in left:
        found.append(clock.epochs_left)
        clock.step += 1
    assert found == left


def test_a_stream_has_no_epochs() -> None:
    assert Clock(2, 1, sized=False).epochs_left == math.inf


def test_a_resumed_run_goes_on_from_the_samples_that_it_had() -> None:
    clock = Clock(4, 2, 16)
    clock.resume(4, 32)  # with half the batch
    assert clock.epochs_left == 1
    clock.step += 1
    assert (clock.step, clock.samples) == (5, 48)


@pytest.mark.parametrize("name", ["steps_per_epoch", "epochs", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_what_is_not_above_zero_is_refused(name: str, value: float) -> None:
    settings = {"steps_per_epoch": 1, "epochs": 1, "batch_size": 1, name: value}
    with pytest.raises(ConfigError, match=f"{name}={value!r}: must be greater than 0"):
        Clock(**settings)
