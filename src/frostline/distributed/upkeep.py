"""Keeps ``DistributedDataParallel`` to what trains, while the frost line moves.

DDP settles whose gradients it exchanges when it is built. Of a parameter that is frozen later it either expects the
gradient, and the next step fails ("Expected to have finished reduction"), or, with ``find_unused_parameters=True``,
goes on sending zeros. Built anew it leaves out what is frozen. But the Trainer, Accelerate and Lightning hold the
wrapper in variables of their own, so it must stay the same object: a second one is built beside it with the same
arguments, and hands over its reducer, the part that exchanges gradients. Hooks, modes and whatever else hangs on the
wrapper are not touched.

That is not a documented use of DDP. What it rests on is tried once when training begins, before anything depends on
it; a wrapper that does not pass is left as it is (:attr:`Upkeep.hindrance`), and ``tests/distributed/test_contract.py``
pins it for the torch that is installed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from frostline.errors import ModelError

__all__ = ["RESTLESS", "UNEVEN", "Upkeep"]

_MEND = (
    "build it with find_unused_parameters=True (Trainer: ddp_find_unused_parameters=True, Lightning: "
    "strategy='ddp_find_unused_parameters_true')"
)
RESTLESS = (
    "what trains changes at every step, and DistributedDataParallel without find_unused_parameters expects the same "
    f"gradients each time: {_MEND}"
)
"""Why a policy that is asked at every step needs ``find_unused_parameters``."""

UNEVEN = (
    "training runs in torch's Join, where a rank whose data have ended decides nothing any more: what trains stays as "
    "it is from here on; give every rank as many batches instead"
)
"""Why nothing is decided while :attr:`Upkeep.held`."""

_MEGABYTE = 1024 * 1024

# Arguments of DDP that its instance keeps under their own name.
_KEPT = frozenset(
    {
        "device_ids",
        "output_device",
        "dim",
        "process_group",
        "broadcast_buffers",
        "forward_sync_buffers",
        "find_unused_parameters",
        "gradient_as_bucket_view",
        "skip_all_reduce_unused_params",
        "batched_grad_copy",
    }
)
# Arguments that are settled elsewhere: by this module, by the process group, or because a wrapper with them is refused.
_SETTLED = frozenset(
    {
        "self",
        "module",
        "init_sync",
        "bucket_cap_mb",
        "bucket_cap_mb_list",
        "check_reduction",  # without effect
        "device_mesh",
        "static_graph",
        "delay_all_reduce_named_params",
        "param_to_hook_all_reduce",
        "mixed_precision",
    }
)


class Upkeep:
    """Lets a DDP wrapper exchange the gradients of what trains, and no others.

    Every rank must call :meth:`follow` at the same step, between a step and the next forward pass. It talks to no
    other rank.

    Args:
        wrapper: as training calls it. It is not kept alive from here.
        restless: layers rest for a step at a time. They stay in the wrapper then, whose own search for unused
            parameters costs less than building it anew at every step.
        compiled: ``torch.compile`` is around the wrapper.

    Attributes:
        hindrance: why the wrapper cannot follow and goes on sending what is frozen; ``None`` where it can.
        process_group: of the wrapper.
        device: on which that group exchanges gradients.

    Raises:
        ModelError: nothing can be frozen under this wrapper.
    """

    def __init__(self, wrapper: DistributedDataParallel, *, restless: bool = False, compiled: bool = False) -> None:
        if wrapper.static_graph:
            raise ModelError(
                "DistributedDataParallel with static_graph=True expects the same gradients at every step, so nothing "
                "can be frozen while it trains: build it without static_graph"
            )
        if restless and not wrapper.find_unused_parameters:
            raise ModelError(RESTLESS)
        self.hindrance = "torch.compile is around it" if compiled else _hindrance(wrapper)
        if self.hindrance is not None and not wrapper.find_unused_parameters:
            raise ModelError(
                "this DistributedDataParallel expects a gradient of every parameter at every step, and cannot be "
                f"changed while it trains ({self.hindrance}): {_MEND}"
            )
        self.process_group: Any = wrapper.process_group
        self.device: torch.device = wrapper.device
        # Who holds the wrapper may throw it away (a second try with smaller batches): its buckets must go with it.
        self._wrapper = weakref.ref(wrapper)
        self._restless = restless
        self._sent = {id(p) for p in wrapper.module.parameters() if p.requires_grad}

    @classmethod
    def find(cls, model: nn.Module, *, restless: bool) -> Upkeep | None:
        """That of the DDP wrapper of ``model``; ``None`` if it has none.

        Raises:
            ModelError: nothing can be frozen under this wrapper, or under ``nn.DataParallel``.
        """
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ModelError(
                "FullyShardedDataParallel (FSDP1) joins parameters to flat ones, of which none can be frozen by "
                "itself; use fully_shard (FSDP2) or DistributedDataParallel"
            )
        compiled = False
        while True:
            if isinstance(model, nn.DataParallel):
                raise ModelError(
                    "nn.DataParallel copies the model at every step, so nothing in it can be frozen; start one process "
                    "per GPU instead: torchrun --nproc-per-node=<GPUs> <your script>"
                )
            inner = getattr(model, "_orig_mod", None)
            compiled = compiled or inner is not None or getattr(model, "_compiled_call_impl", None) is not None
            if isinstance(model, DistributedDataParallel):
                return cls(model, restless=restless, compiled=compiled)
            if not isinstance(inner, nn.Module):
                return None
            model = inner

    @property
    def joining(self) -> bool:
        """Whether training runs, or ran, in torch's ``Join``: ranks may not be at the same step any more."""
        wrapper = self._wrapper()
        return wrapper is not None and bool(wrapper._join_config.enable)

    @property
    def held(self) -> bool:
        """Whether the wrapper must stay as it is: a rank without batches follows nothing, yet answers each exchange."""
        return self.joining and self.hindrance is None and not self._restless

    @property
    def limit(self) -> str | None:
        """What the hindrance costs, in words."""
        if self.hindrance is None:
            return None
        return (
            "DistributedDataParallel goes on sending the gradients of what is frozen, as zeros: it cannot be changed "
            f"while it trains ({self.hindrance})"
        )

    def follow(self, active: Iterable[nn.Parameter], resting: Iterable[nn.Parameter] = ()) -> None:
        """Exchange the gradients of ``active`` from the next forward pass on; nothing happens if that is so already.

        Args:
            active: every parameter that trains.
            resting: those that do not train for now.
        """
        wrapper = self._wrapper()
        if wrapper is None or self.hindrance is not None:
            return
        sent = [*active, *(resting if self._restless else ())]
        if {id(p) for p in sent} == self._sent:
            return
        asleep = [p for p in sent if not p.requires_grad]
        for parameter in asleep:  # DDP leaves out what requires no gradient while it is built
            parameter.requires_grad_(True)
        try:
            _replace_reducer(wrapper)
        finally:
            for parameter in asleep:
                parameter.requires_grad_(False)
        self._sent = {id(p) for p in sent}


def _replace_reducer(wrapper: DistributedDataParallel) -> None:
    """Give ``wrapper`` a reducer for the parameters that require gradients now."""
    arguments = _arguments(wrapper)
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    # The old one first: its buckets are as large as the gradients, and its hooks must not see another backward pass.
    wrapper.reducer._remove_autograd_hooks()
    del wrapper.reducer, wrapper.logger
    fresh = _beside(wrapper, arguments)
    wrapper.reducer, wrapper.logger = fresh.reducer, fresh.logger
    wrapper._has_rebuilt_buckets = False
    for hook, state in hooks:
        _forget_buckets(state)
        wrapper.register_comm_hook(state, hook)


def _beside(wrapper: DistributedDataParallel, arguments: dict[str, Any]) -> DistributedDataParallel:
    """A second wrapper around the same module."""
    # Replicas are equal, so nothing need be verified or broadcast: a rank that stops alone must not wait for others.
    return DistributedDataParallel(wrapper.module, init_sync=False, **arguments)


def _arguments(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """What ``wrapper`` was built with.

    Raises:
        LookupError: this torch has arguments that are not known here, or lacks one that is needed.
        AttributeError: it keeps one elsewhere.
    """
    taken = set(inspect.signature(DistributedDataParallel.__init__).parameters)
    if unknown := sorted(taken - _KEPT - _SETTLED):
        names = ", ".join(unknown)
        raise LookupError(f"torch {torch.__version__} builds it with {names}, which Frostline does not know")
    if "init_sync" not in taken:
        raise LookupError(f"torch {torch.__version__} cannot build it without a broadcast of all weights")
    if "forward_sync_buffers" in taken:  # the new name of the same thing; both together are a warning
        taken.discard("broadcast_buffers")
    arguments = {name: getattr(wrapper, name) for name in taken & _KEPT}
    if not wrapper.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = wrapper.bucket_bytes_cap / _MEGABYTE
    if "bucket_cap_mb_list" in taken and wrapper.bucket_bytes_cap_list:
        arguments["bucket_cap_mb_list"] = [size / _MEGABYTE for size in wrapper.bucket_bytes_cap_list]
    return arguments


def _hindrance(wrapper: DistributedDataParallel) -> str | None:
    """Why ``wrapper`` cannot be given another reducer; ``None`` once that has been tried."""
    if type(wrapper) is not DistributedDataParallel:
        return f"{type(wrapper).__name__} is a class of its own"
    try:
        if wrapper.mixed_precision is not None:
            return "its own mixed_precision hangs on the reducer that it began with"
        if wrapper._delay_all_reduce_params:
            return "it delays gradients (delay_all_reduce_named_params)"
        if wrapper._use_python_reducer:
            return "torch._dynamo.config.optimize_ddp is 'python_reducer'"
        if any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters()):
            return "its optimizer runs in the backward pass"
        told = wrapper._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        if told.get("comm_hook") and not wrapper._comm_hooks:
            return "it has a built-in communication hook, which DDP does not remember"
        _try_out(wrapper)
    except Exception as error:  # whatever it is, it must come to light now and not in the middle of training
        return f"{type(error).__name__}: {error}"
    return None


def _try_out(wrapper: DistributedDataParallel) -> None:
    """Build a second wrapper and throw it away: for one parameter, as for all it would take what gradients take."""
    ignored = wrapper.parameters_to_ignore
    sent = [p for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored]
    least = min(sent, key=torch.numel)
    for parameter in sent:
        parameter.requires_grad_(parameter is least)
    try:
        _beside(wrapper, _arguments(wrapper)).reducer._remove_autograd_hooks()
    finally:
        for parameter in sent:
            parameter.requires_grad_(True)


def _forget_buckets(state: object) -> None:
    """Let a communication hook begin anew: what it keeps for each bucket does not fit other buckets.

    Of torch's own hooks that is PowerSGD. As at its start it waits for two steps: buckets are filled in the order of
    the first backward pass from the second on.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if isinstance(state, PowerSGDState):
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
        state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))
