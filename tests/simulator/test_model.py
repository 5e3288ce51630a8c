"""The simulator against numbers worked out by hand, and against what must hold for any numbers."""

from __future__ import annotations

import random

import pytest

from frostline.errors import ConfigError
from frostline.memory import MemoryModel, OptimizerCost, Way
from frostline.memory.spans import Activations, Spans
from frostline.simulator import Cluster, Link, compare_packings, simulate
from frostline.simulator.cluster import Blocks, Part
from frostline.simulator.model import (
    PACKINGS,
    SIDES,
    all_reduce_seconds,
    largest_batch,
    memory_bytes,
    placement,
    step_time,
)
from tests.simulator.worlds import BLOCKS, cluster, course, profile

RANKS = [2**i for i in range(11)]
FAST = Link(bytes_per_second=float("inf"), latency_seconds=0.0)


# -- the all-reduce -----------------------------------------------------------------------------------


def test_a_ring_worked_out_by_hand() -> None:
    # 2 * 3/4 * 400 / 100 + 2 * 3 * 0.5
    assert all_reduce_seconds(cluster(), 400, 4) == pytest.approx(6.0 + 3.0)


def test_one_rank_sends_nothing() -> None:
    assert all_reduce_seconds(cluster(), 1e12, 1) == 0.0
    assert step_time(profile(), cluster(), depth=0, batch=1, ranks=1).waiting == 0.0


def test_a_perfect_link_costs_nothing() -> None:
    assert all_reduce_seconds(cluster(between=FAST), 1e12, 1024) == 0.0


def test_more_ranks_and_more_bytes_take_longer_and_bandwidth_bounds_them() -> None:
    times = [all_reduce_seconds(cluster(), 400, ranks) for ranks in RANKS]
    assert times == sorted(set(times))
    assert all_reduce_seconds(cluster(), 401, 8) > all_reduce_seconds(cluster(), 400, 8)
    # Without latency no number of ranks sends its bytes more than twice.
    slow = cluster(between=Link(bytes_per_second=100.0))
    assert all_reduce_seconds(slow, 400, 2) == pytest.approx(4.0)
    assert 7.9 < all_reduce_seconds(slow, 400, 1024) < 8.0


def test_ranks_of_a_host_share_its_link_and_have_a_faster_one() -> None:
    inside = Link(bytes_per_second=1000.0, latency_seconds=0.1)
    hosts = cluster(ranks_per_host=4, inside=inside)
    ring = 2 * 3 * (100 / 1000 + 0.1)  # four ranks, 400 bytes
    assert all_reduce_seconds(hosts, 400, 4) == pytest.approx(ring)
    between = 2 * 1 * (200 / 100 + 0.5)  # two hosts, 400 bytes over each one's link
    assert all_reduce_seconds(hosts, 400, 8) == pytest.approx(ring + between)
    assert all_reduce_seconds(hosts, 400, 5) == pytest.approx(ring + between)


# -- a step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(BLOCKS))
def test_a_step_counts_blocks(depth: int) -> None:
    found = step_time(profile(step_seconds=0.25), cluster(), depth=depth, batch=3, ranks=1)
    assert found.total == pytest.approx(0.25 + 3 * (3 * BLOCKS - 2 * depth))
    # With a full cache the prefix does not run.
    found = step_time(profile(), cluster(), depth=depth, batch=3, ranks=1, skipped=float(depth))
    assert found.total == pytest.approx(3 * 3 * (BLOCKS - depth))


def test_only_what_trains_is_updated() -> None:
    blocks = [Blocks(count=BLOCKS, forward_seconds=1.0, parameter_bytes=1, activation_bytes=1, update_seconds=0.1)]
    given = profile(step_seconds=0.25, blocks=blocks)
    fixed = [step_time(given, cluster(), depth=depth, batch=7, ranks=1).fixed for depth in range(BLOCKS)]
    assert fixed == pytest.approx([0.65, 0.55, 0.45, 0.35])


def test_only_what_trains_is_sent() -> None:
    waiting = [step_time(profile(), cluster(), depth=depth, batch=1, ranks=2).waiting for depth in range(BLOCKS)]
    # 460, then without the stem and one block 320, 220, 120: at 100 bytes/s, and two latencies of 0.5 s.
    assert waiting == pytest.approx([5.6, 4.2, 3.2, 2.2])


@pytest.mark.parametrize(("overlap", "waiting"), [(0.0, 5.6), (0.25, 3.6), (0.5, 1.6), (1.0, 0.0)])
def test_the_backward_pass_hides_a_share_of_itself(overlap: float, waiting: float) -> None:
    # Sending takes 5.6 s, the backward pass of one sample 8 s.
    found = step_time(profile(), cluster(overlap=overlap), depth=0, batch=1, ranks=2)
    assert found.waiting == pytest.approx(waiting)
    assert found.total == pytest.approx(12.0 + waiting)


def test_a_measured_backward_pass_is_taken_as_it_is() -> None:
    head = Part(forward_seconds=0.5, backward_seconds=0.75, parameter_bytes=20, activation_bytes=2)
    assert step_time(profile(head=head), cluster(), depth=3, batch=2, ranks=1).backward == pytest.approx(2 * 2.75)


# -- memory -------------------------------------------------------------------------------------------


def test_memory_worked_out_by_hand() -> None:
    given = profile(sample_bytes=7)
    # Weights 460, of which 460 train: gradients once, moments twice; activations 5 + 40 + 2, and 7 for the sample.
    assert memory_bytes(given, 0, 3) == 460 + 3 * 460 + 3 * (47 + 7)
    # Three blocks frozen, and the stem with them: 120 bytes train.
    assert memory_bytes(given, 3, 3) == 460 + 3 * 120 + 3 * (12 + 7)


@pytest.mark.parametrize("depth", range(BLOCKS))
@pytest.mark.parametrize("batch", [1, 9])
def test_the_one_memory_model_says_the_same(depth: int, batch: int) -> None:
    given = profile(sample_bytes=7)
    trains = [part.parameter_bytes for part in given.parts]
    # What a sample takes at any depth is the head's, which never freezes.
    kept = [float(part.activation_bytes) for part in given.parts]
    kept[-1] += given.sample_bytes
    none = (0.0,) * len(kept)
    activations = Activations(Spans(none, none, none, none), Spans(tuple(kept), none, none, none))
    model = MemoryModel(sum(trains), trains, {Way(): activations}, OptimizerCost(given.optimizer_state, 0.0))
    assert memory_bytes(given, depth, batch) == model.peak(Way(), batch, depth, accumulates=True)


@pytest.mark.parametrize("depth", range(BLOCKS))
def test_the_largest_batch_fits_and_one_more_does_not(depth: int) -> None:
    given, machines = profile(sample_bytes=7), cluster(device_memory=5_000)
    most = largest_batch(given, machines, depth)
    assert memory_bytes(given, depth, most) <= 5_000 < memory_bytes(given, depth, most + 1)
    exact = cluster(device_memory=int(memory_bytes(given, depth, most)))
    assert largest_batch(given, exact, depth) == most
    assert largest_batch(given, cluster(device_memory=100), depth) == 0


# -- packing ------------------------------------------------------------------------------------------


def test_performance_packing_fills_the_memory_and_keeps_the_ranks() -> None:
    given, machines = profile(), cluster(device_memory=2_500)
    # At depth 0: (2500 - 4 * 460) / 47 = 14; at depth 2: (2500 - 460 - 3 * 220) / 22 = 62.
    assert (largest_batch(given, machines, 0), largest_batch(given, machines, 2)) == (14, 62)
    packed = {"batch": 10, "ranks": 8, "samples_per_epoch": 10_000}
    assert placement(given, machines, "performance", depth=2, **packed) == (62, 8)
    assert placement(given, machines, "none", depth=2, **packed) == (10, 8)
    # At depth 0 nothing is free that was not before.
    assert placement(given, machines, "performance", depth=0, **packed) == (10, 8)
    # No more than an epoch in one step.
    assert placement(given, machines, "performance", depth=2, batch=10, ranks=8, samples_per_epoch=100) == (13, 8)


def test_efficiency_packing_keeps_the_global_batch_and_halves_the_ranks() -> None:
    given, machines = profile(), cluster(device_memory=2_500)
    for ranks, expected in ((64, (40, 16)), (6, (20, 3)), (3, (10, 3)), (2, (20, 1)), (1, (10, 1))):
        found = placement(given, machines, "efficiency", depth=2, batch=10, ranks=ranks, samples_per_epoch=10_000)
        assert found == expected
        assert found[0] * found[1] == 10 * ranks
    assert placement(given, machines, "efficiency", depth=0, batch=5, ranks=8, samples_per_epoch=10_000) == (5, 8)


def test_packing_pays_where_sending_is_what_takes_long() -> None:
    moves = course((40, 2), samples=640)
    sides = compare_packings(profile(), cluster(), moves, ranks=[32], batch=2)[32]
    seconds = {side: sides[side].seconds for side in SIDES}
    assert seconds["performance"] < seconds["none"] < seconds["full"]
    assert sides["efficiency"].cost < sides["none"].cost < sides["full"].cost


# -- a run --------------------------------------------------------------------------------------------


def test_a_run_worked_out_by_hand() -> None:
    # 100 samples an epoch, 2 ranks with 8 each: 6 steps of 16 and one of 4 (2 each), twice.
    found = simulate(profile(), cluster(), course(), ranks=2, batch=8)
    epoch = 6 * (8 * 12 + 5.6) + (2 * 12 + 5.6)
    assert found.epoch_seconds == pytest.approx((epoch, epoch))
    assert (found.steps, found.seconds, found.cost) == (14, pytest.approx(2 * epoch), pytest.approx(4 * epoch))
    assert [stage.samples for stage in found.stages] == [200]
    assert found.stages[0].step_seconds == pytest.approx(epoch / 7)


def test_a_move_begins_a_stage_and_costs_a_restart_where_several_ranks_train() -> None:
    machines = cluster(restart_seconds=1000.0)
    found = simulate(profile(), machines, course((50, 2), (120, 3)), ranks=2, batch=8)
    assert [(s.start, s.samples, s.depth, s.restart) for s in found.stages] == [
        (0, 50, 0, 0.0), (50, 70, 2, 1000.0), (120, 80, 3, 1000.0),
    ]  # fmt: skip
    without = simulate(profile(), cluster(), course((50, 2), (120, 3)), ranks=2, batch=8)
    assert found.seconds == pytest.approx(without.seconds + 2000.0)
    assert found.cost == pytest.approx(without.cost + 4000.0)
    assert found.epoch_seconds[1] == pytest.approx(without.epoch_seconds[1] + 1000.0)
    alone = simulate(profile(), machines, course((50, 2), (120, 3)), ranks=1, batch=8)
    assert [stage.restart for stage in alone.stages] == [0.0, 0.0, 0.0]


def test_ranks_that_are_packed_away_cost_nothing() -> None:
    found = simulate(profile(), cluster(), course((100, 3)), ranks=4, batch=8, packing="efficiency")
    assert [(stage.ranks, stage.batch) for stage in found.stages] == [(4, 8), (1, 32)]
    first, second = (stage.seconds for stage in found.stages)
    assert found.cost == pytest.approx(4 * first + second)


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_in_one_stage_and_every_second_in_one_epoch(seed: int) -> None:
    draw = random.Random(seed)
    moves = sorted((draw.randrange(400), draw.randrange(BLOCKS)) for _ in range(draw.randrange(6)))
    given = course(*moves, samples=draw.randint(1, 200), epochs=draw.choice([0.5, 1.0, 2.0, 3.7]))
    for packing in PACKINGS:
        found = simulate(
            profile(), cluster(restart_seconds=3.0), given, ranks=draw.choice(RANKS), batch=draw.randint(1, 20),
            packing=packing, cache=draw.random() < 0.5,
        )  # fmt: skip
        seen = 0
        for stage in found.stages:
            assert stage.start == seen
            assert stage.depth == given.depth_at(seen)
            seen += stage.samples
        assert seen == given.samples
        assert sum(found.epoch_seconds) == pytest.approx(found.seconds)


def test_freezing_never_takes_longer_and_more_frozen_never_longer_than_less() -> None:
    seconds = [simulate(profile(), cluster(), course((0, k)), ranks=8, batch=4).seconds for k in range(BLOCKS)]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == BLOCKS


def test_a_perfect_network_scales_until_the_samples_run_out() -> None:
    machines = cluster(between=FAST)
    seconds = [simulate(profile(), machines, course(samples=4096), ranks=n, batch=4).seconds for n in RANKS]
    assert seconds == pytest.approx([seconds[0] / n for n in RANKS])


# -- the cache ----------------------------------------------------------------------------------------


def cached_epochs(*moves: tuple[int, int], epochs: float = 3.0) -> list[float]:
    """Seconds a sample of each epoch; nothing is sent."""
    found = simulate(profile(), cluster(), course(*moves, epochs=epochs), ranks=1, batch=10, cache=True)
    return [seconds / 100 for seconds in found.epoch_seconds]


def check(depth: int) -> float:
    """Before the first record is read at a depth, a batch of 10 runs: six times below the line, four times above it."""
    return 10 * (6 * depth + 4 * (BLOCKS - depth)) / 100


def test_records_are_read_from_the_next_epoch_on() -> None:
    assert cached_epochs((0, 3)) == pytest.approx([6.0, 3.0 + check(3), 3.0])  # 3N - 2k, then 3(N - k)


def test_samples_that_came_before_the_move_have_no_record() -> None:
    # Half of the first epoch at depth 0. In the second one half of the samples have a record, in the third all.
    assert cached_epochs((50, 2)) == pytest.approx([10.0, 7.0 + check(2), 6.0])


def test_records_of_a_lower_line_are_brought_to_the_new_one() -> None:
    # Records of depth 1 save one block; those made of them in the second epoch save all three.
    assert cached_epochs((0, 1), (100, 3)) == pytest.approx([10.0, 5.0 + check(3), 3.0])


def test_a_thaw_makes_records_useless() -> None:
    assert cached_epochs((0, 3), (100, 1), (200, 3)) == pytest.approx([6.0, 10.0, 5.0 + check(3)])
    # Down again within the epoch: the records of the first half are of weights that have trained since.
    assert cached_epochs((0, 3), (50, 1), (60, 3), epochs=2.0)[1] == pytest.approx(6.0 - 0.4 * 3 - 0.1 * 1 + check(3))


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "perf"}, "unknown packing 'perf': did you mean 'performance'"),
        ({"ranks": 0}, "ranks=0: must be at least 1"),
        ({"batch": 0}, "batch=0: must be at least 1"),
        ({"batch": 200}, r"batch=200: at depth 0 .* at most 173 fit"),
        ({"course": course((50, 4))}, r"depth=4 freezes all 4 blocks .*valid depths: 0\.\.3"),
        ({"cluster": cluster(device_memory=100)}, "not even one sample fits"),
    ],
)
def test_what_cannot_be_is_said(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"cluster": cluster(), "course": course(), "ranks": 2, "batch": 8, **change}
    machines, moves = given.pop("cluster"), given.pop("course")
    assert isinstance(machines, Cluster)
    with pytest.raises(ConfigError, match=message):
        simulate(profile(), machines, moves, **given)  # type: ignore[arg-type]
