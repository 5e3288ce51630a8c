"""What upkeep takes for granted of the installed torch's DistributedDataParallel; one process is enough for that."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import frostline
from frostline.distributed import Buckets, Upkeep
from frostline.distributed.upkeep import _arguments, _beside
from frostline.errors import ModelError
from frostline.memory import LiveBytes
from tests.adapters.hosts import batches, bert
from tests.distributed.traffic import Traffic, active_bytes, counted

pytestmark = pytest.mark.usefixtures("alone")

PLAN: dict[str, Any] = {"steps_per_epoch": 8, "epochs": 1, "batch_size": 8}


def _step(ddp: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    ddp.train()
    ddp(**batches(8)[0]).loss.backward()
    if optimizer is not None:
        optimizer.step()
    ddp.zero_grad()


def _freeze(upkeep: Upkeep, model: nn.Module, count: int) -> None:
    """Freeze the first ``count`` parameters, and tell."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    for parameter in parameters[:count]:
        parameter.requires_grad_(False)
        parameter.grad = None
    upkeep.follow(parameters[count:])


# Every argument of this torch that a wrapper may have been built with, and what it leaves on the instance.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"bucket_cap_mb": 0.25},
    {"bucket_cap_mb": 25},
    {"bucket_cap_mb_list": [1, 2]},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"broadcast_buffers": False},
    {"forward_sync_buffers": False},
    {"skip_all_reduce_unused_params": True, "find_unused_parameters": True},
    {"batched_grad_copy": True},
    {"dim": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_second_wrapper_is_built_as_the_first(settings: dict[str, Any]) -> None:
    if missing := set(settings) - set(inspect.signature(DistributedDataParallel.__init__).parameters):
        pytest.skip(f"torch {torch.__version__} has no {missing}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers is on its way out
        ddp = DistributedDataParallel(bert(), process_group=dist.new_group([0]), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = _beside(ddp, _arguments(ddp))
    for name, value in vars(ddp).items():
        if isinstance(value, (bool, int, float, str, type(None))):
            assert vars(second)[name] == value, name
    assert second.process_group is ddp.process_group
    assert getattr(second, "_bucket_config", None) == getattr(ddp, "_bucket_config", None)
    assert Upkeep(ddp).hindrance is None


def test_wrapper_stays_and_its_reducer_goes() -> None:
    model, traffic = bert(), Traffic()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(traffic, counted)
    calls: list[str] = []
    ddp.register_forward_pre_hook(lambda *_: calls.append("before"))
    ddp.register_forward_hook(lambda *_: calls.append("after"))
    ddp.marked = "by its owner"  # type: ignore[assignment]
    upkeep = Upkeep(ddp)
    for _ in range(2):
        _step(ddp)
        assert traffic.taken() == active_bytes(model)
    ddp.require_backward_grad_sync = False
    gone = [weakref.ref(part) for part in (ddp.reducer, ddp.logger)]
    _freeze(upkeep, model, 10)
    gc.collect()
    assert [part() for part in gone] == [None, None]
    assert not ddp.require_backward_grad_sync
    ddp.require_backward_grad_sync = True
    assert ddp.marked == "by its owner"
    assert ddp.module is model
    calls.clear()
    for _ in range(3):
        _step(ddp)
        assert traffic.taken() == active_bytes(model)
    assert calls == ["before", "after"] * 3
    _freeze(upkeep, model, 0)
    for _ in range(3):
        _step(ddp)
        assert traffic.taken() == active_bytes(model)


@pytest.mark.parametrize("born_frozen", [0, 30])
def test_buckets_are_as_large_as_the_gradients_and_never_two_sets(born_frozen: int) -> None:
    """What memory budgets count on."""
    model = bert()
    for parameter in list(model.parameters())[:born_frozen]:
        parameter.requires_grad_(False)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        weights = live.now
        ddp = DistributedDataParallel(model)
        assert live.peak - weights == pytest.approx(Buckets.of(model).first, rel=0.01)
        live.restart()
        upkeep = Upkeep(ddp)
        assert live.peak - weights == pytest.approx(active_bytes(model), rel=0.01)
        for frozen in (40, 50, born_frozen):
            before = live.now - weights
            live.restart()
            _freeze(upkeep, model, frozen)
            assert live.peak - weights <= 1.01 * max(before, active_bytes(model))
            for _ in range(3):  # they are made anew in the second step
                _step(ddp)
                assert live.now - weights == pytest.approx(active_bytes(model), rel=0.01)


def test_nothing_is_done_where_nothing_changes() -> None:
    model = bert()
    ddp = DistributedDataParallel(model)
    before = ddp.reducer
    upkeep = Upkeep(ddp)
    upkeep.follow(model.parameters())
    assert ddp.reducer is before
    _freeze(upkeep, model, 10)
    once = ddp.reducer
    _freeze(upkeep, model, 10)
    assert ddp.reducer is once is not before


def test_wrapper_is_not_kept_alive() -> None:
    ddp = DistributedDataParallel(bert())
    frost = frostline.Frostline(ddp, None, policy="static", depth=1, **PLAN)
    thrown_away = weakref.ref(ddp)
    del ddp
    gc.collect()
    assert thrown_away() is None
    frost.finish()


def test_resting_layers_can_be_kept_in() -> None:
    """They are asleep while the wrapper changes, and wake up later."""
    model, traffic = bert(), Traffic()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp.register_comm_hook(traffic, counted)
    upkeep = Upkeep(ddp, restless=True)
    everything = list(model.parameters())
    for parameter in everything[:12]:
        parameter.requires_grad_(False)
    upkeep.follow(everything[12:], everything[8:12])
    assert [p.requires_grad for p in everything[:13]] == [False] * 12 + [True]
    kept = sum(4 * p.numel() for p in everything[8:])
    _step(ddp)
    assert traffic.taken() == kept
    for parameter in everything[8:12]:
        parameter.requires_grad_(True)
    _step(ddp)
    assert traffic.taken() == kept


def test_power_sgd_forgets_its_buckets() -> None:
    model = bert()
    ddp = DistributedDataParallel(model)
    state = PowerSGDState(None, start_powerSGD_iter=3, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook)
    upkeep = Upkeep(ddp)
    for _ in range(5):
        _step(ddp)
    assert state.error_dict
    assert state.q_memory_dict
    _freeze(upkeep, model, 10)
    assert not state.error_dict
    assert not state.q_memory_dict
    assert state.iter == 1
    for _ in range(4):
        _step(ddp)
    assert state.error_dict


class _Own(DistributedDataParallel):
    pass


def _with_builtin_hook(ddp: DistributedDataParallel) -> None:
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)


def _unfamiliar(ddp: DistributedDataParallel) -> None:
    del ddp.bucket_bytes_cap_default


def _in_backward(ddp: DistributedDataParallel) -> None:
    next(ddp.module.parameters())._in_backward_optimizers = []


HINDRANCES: dict[str, tuple[Any, Any, str]] = {
    "subclass": (_Own, lambda ddp: None, "_Own is a class of its own"),
    "builtin": (DistributedDataParallel, _with_builtin_hook, "built-in communication hook"),
    "attribute": (DistributedDataParallel, _unfamiliar, "bucket_bytes_cap_default"),
    "in-backward": (DistributedDataParallel, _in_backward, "optimizer runs in the backward pass"),
}


@pytest.mark.parametrize("name", HINDRANCES)
def test_wrapper_that_must_stay_as_it_is(name: str) -> None:
    build, change, message = HINDRANCES[name]
    ddp = build(bert())
    change(ddp)
    with pytest.raises(ModelError, match=f"{message}.*: build it with find_unused_parameters=True"):
        frostline.Frostline(ddp, None, policy="static", depth=1, **PLAN)
    model = bert()
    ddp = build(model, find_unused_parameters=True)
    change(ddp)
    before = ddp.reducer
    frost = frostline.Frostline(ddp, None, policy="static", depth=1, **PLAN)
    assert [message in limit and "goes on sending" in limit for limit in frost.summary()["limits"]] == [True]
    assert ddp.reducer is before
    if name != "in-backward":
        _step(ddp)
    frost.finish()
    assert ddp.reducer is before


def test_torch_with_an_argument_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ddp = DistributedDataParallel(bert())
    known = inspect.signature(DistributedDataParallel.__init__)
    news = inspect.Parameter("warp_drive", inspect.Parameter.KEYWORD_ONLY, default=False)
    monkeypatch.setattr(inspect, "signature", lambda _: known.replace(parameters=[*known.parameters.values(), news]))
    with pytest.raises(ModelError, match="warp_drive, which Frostline does not know"):
        Upkeep(ddp)


def test_flat_parameters() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands in for FSDP1's wrapper, which wants a GPU."""

    with pytest.raises(ModelError, match=r"use fully_shard \(FSDP2\)"):
        Upkeep.find(nn.Sequential(FullyShardedDataParallel()), restless=False)


def test_compiled_around() -> None:
    ddp = DistributedDataParallel(bert(), find_unused_parameters=True)
    upkeep = Upkeep.find(torch.compile(ddp), restless=False)
    assert upkeep is not None
    assert upkeep.hindrance == "torch.compile is around it"


def test_compiled_inside() -> None:
    model, traffic = bert(), Traffic()
    ddp = DistributedDataParallel(torch.compile(model, backend="eager"))
    ddp.register_comm_hook(traffic, counted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(ddp, optimizer, policy="ramp", level=0.75, evaluations_per_epoch=4, **PLAN)
    for _ in range(8):
        active = active_bytes(model)
        _step(ddp, optimizer)
        assert traffic.taken() == active
        frost.after_step()
    assert frost.depth == 3
    frost.finish()


def test_uneven_inputs() -> None:
    """In Join another rank may have no more batches: it answers exchanges, and is at another step ever after."""
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    frost = frostline.Frostline(ddp, optimizer, policy="ramp", level=0.75, evaluations_per_epoch=4, **PLAN)
    with Join([ddp]):
        for _ in range(4):
            _step(ddp, optimizer)
            frost.after_step()
    for _ in range(4):
        _step(ddp, optimizer)
        frost.after_step()
    assert frost.depth == 0
    assert any("training runs in torch's Join" in limit for limit in frost.summary()["limits"])
