"""The one place that changes ``requires_grad``, ``.grad``, train/eval mode, optimizer state and what a wrapper sends.

What works (measured): frozen parameters stay in their optimizer groups,
``requires_grad`` False, ``.grad`` None. A zero gradient would still move them by momentum and weight decay;
taking them out of the groups breaks ``state_dict`` and the schedulers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from frostline.blocks import BlockStack
from frostline.distributed import Upkeep, put_back
from frostline.errors import ConfigError, choices_message
from frostline.policies.base import Decision, Moments
from frostline.trace import first_tensor, replace_tensor

__all__ = ["Freezer"]


class Freezer:
    """Applies decisions to a model and its optimizer. Freezing and thawing are idempotent.

    Args:
        stack: where the model can be cut.
        optimizer: whose state of prefix parameters is dropped (``None``: there is none yet).
        moments: what becomes of the optimizer state of resting layers: kept, dropped, or paged to the host's memory.
        upkeep: of the model's data-parallel wrapper, where it has one.
    """

    def __init__(
        self,
        stack: BlockStack,
        optimizer: torch.optim.Optimizer | None = None,
        moments: Moments = "keep",
        upkeep: Upkeep | None = None,
    ) -> None:
        self.stack = stack
        self.optimizer = optimizer
        self.moments = moments
        self.upkeep = upkeep
        self.decision = Decision()
        # Only ever lower requires_grad: what was born frozen (a LoRA base, fixed positions) stays so.
        self._trainable = {n for n, p in stack.model.named_parameters() if p.requires_grad}
        self._pinned: list[nn.Module] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._switched: list[nn.Module] = []

    @property
    def depth(self) -> int:
        return self.decision.depth

    def apply(self, decision: Decision) -> None:
        """Make the model what ``decision`` says.

        Raises:
            ConfigError: a depth outside ``0..N-1``, a resting name that is no module, or nothing left to train.
        """
        self._check(decision)
        put_back(self.stack.model)
        prefix = self.stack.prefix_parameters(decision.depth)
        resting = self._resting_parameters(decision.resting)
        quiet = set(prefix) | resting
        if not self._trainable - quiet:
            raise ConfigError(
                f"depth {decision.depth} with {len(decision.resting)} resting modules freezes every trainable "
                "parameter: nothing would be left to train"
            )
        for name, parameter in self.stack.model.named_parameters():
            wanted = name in self._trainable and name not in quiet
            parameter.requires_grad_(wanted)
            if not wanted:
                parameter.grad = None
            # Thawing starts with fresh moments; resting layers, above the line, keep theirs or as the policy says.
            if name in prefix or (self.moments == "drop" and name in resting):
                self._drop_state(parameter)
            elif self.moments == "host":
                self._page(parameter, torch.device("cpu") if name in resting else parameter.device)
        if (decision.depth, bool(decision.resting)) != (self.depth, bool(self.decision.resting)):
            self._set_line(decision.depth, resting=bool(decision.resting))
        self.decision = decision
        if self.upkeep is not None:
            parameters = dict(self.stack.model.named_parameters())
            trained = [p for name, p in parameters.items() if name in self._trainable and name not in quiet]
            asleep = [parameters[name] for name in resting & self._trainable if name not in prefix]
            self.upkeep.follow(trained, asleep)

    def release(self) -> None:
        """Thaw everything and take away every hook and pin: the model is an ordinary one again."""
        put_back(self.stack.model)
        for name, parameter in self.stack.model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
            if self.moments == "host":
                self._page(parameter, parameter.device)
        self._set_line(0)
        self.decision = Decision()
        if self.upkeep is not None:
            self.upkeep.follow(p for name, p in self.stack.model.named_parameters() if name in self._trainable)

    # -- checks ---------------------------------------------------------------------------------

    def _check(self, decision: Decision) -> None:
        blocks = len(self.stack)
        if not 0 <= decision.depth < blocks:
            raise ConfigError(
                f"depth {decision.depth} is outside 0..{blocks - 1}: of {blocks} blocks at least one stays active"
            )

    def _resting_parameters(self, resting: Collection[str]) -> set[str]:
        """Names of the parameters that ``resting``, paths of parameters and modules, stands for."""
        parameters = dict(self.stack.model.named_parameters())
        found = {path for path in resting if path in parameters}
        modules = dict(self.stack.model.named_modules()) if len(found) < len(set(resting)) else {}
        inside: set[int] = set()
        for path in set(resting) - found:
            if path not in modules:
                raise ConfigError(choices_message("resting module or parameter", path, [*modules, *parameters]))
            inside.update(id(p) for p in modules[path].parameters())
        return found | {n for n, p in parameters.items() if id(p) in inside} if inside else found

    def _drop_state(self, parameter: nn.Parameter) -> None:
        if self.optimizer is not None:
            self.optimizer.state.pop(parameter, None)

    def _page(self, parameter: nn.Parameter, device: torch.device) -> None:
        """Move the optimizer state of ``parameter`` to ``device``."""
        state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        for key, value in state.items():
            # Not the count of steps, which many optimizers keep on the host.
            if key != "step" and isinstance(value, torch.Tensor) and value.device != device:
                state[key] = value.to(device)

    # -- the frost line -------------------------------------------------------------------------

    def _set_line(self, depth: int, *, resting: bool = False) -> None:
        """Move eval mode and the boundary to ``depth``; at 0 nothing is installed, but where layers rest."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._pinned:
            _unpin(module, self.stack.model.training)
        self._pinned = self.stack.prefix_modules(depth)
        for module in self._pinned:
            _pin(module)
        blocks = self.stack.blocks
        if depth == 0:
            if resting:  # with a resting stem the input of block 0 needs no gradient
                self._handles.append(blocks[0].register_forward_pre_hook(_mend, with_kwargs=True))
            return
        boundary = blocks[depth]
        # Parents may hand in a hidden state that requires gradients (input-require-grads for checkpointing,
        # an adapter on the embedding): cut it at block 0, so that the prefix builds no graph, and at the line.
        self._handles.append(blocks[0].register_forward_pre_hook(_cut, with_kwargs=True))
        self._handles.append(boundary.register_forward_pre_hook(_cut, with_kwargs=True))
        self._handles.append(boundary.register_forward_pre_hook(_mend, with_kwargs=True))
        if self.stack.noisy_parents:
            self._install_switch(boundary)

    def _install_switch(self, boundary: nn.Module) -> None:
        """Run the whole model in eval mode until the boundary: code between the blocks is random too."""
        self._handles.append(boundary.register_forward_pre_hook(self._switch_on, prepend=True))
        for ancestor in self.stack.ancestors():
            self._handles.append(ancestor.register_forward_pre_hook(self._switch_off))
            self._handles.append(ancestor.register_forward_hook(self._switch_on, always_call=True))

    def _switch_off(self, *_: Any) -> None:
        if self._switched:
            return  # an outer ancestor did it
        self._switched = [m for m in self.stack.model.modules() if m.training]
        for module in self._switched:
            module.training = False

    def _switch_on(self, *_: Any) -> None:
        for module in self._switched:
            module.training = True
        self._switched = []


class _StayInEval:
    """Stands in for the ``train`` of a pinned module, and knows the modes it would have without the pin.

    An object, not a closure or a bound function: ``copy.deepcopy`` and ``pickle`` of the model bind the copy. A flag
    rather than a hook keeps the module in eval mode, so that ``torch.compile`` sees a constant.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modes = [(inner, inner.training) for inner in module.modules()]
        self.trained = False

    def __call__(self, mode: bool = True) -> nn.Module:
        self.trained = self.trained or mode
        return nn.Module.train(self.module, False)


def _pin(module: nn.Module) -> None:
    """Put ``module`` in eval mode and keep it there, whoever calls ``model.train()``."""
    pin = _StayInEval(module)
    module.eval()
    module.train = pin  # type: ignore[method-assign]


def _unpin(module: nn.Module, mode: bool) -> None:
    """Put back what ``module.train`` would have made of it: where nobody called it, the modes that it had."""
    pin = vars(module).pop("train")
    if pin.trained or not mode:
        module.train(mode)
        return
    for inner, had in pin.modes:
        inner.training = had


def _is_reentrant(block: nn.Module) -> bool:
    """Whether ``block`` is checkpointed the reentrant way, which needs an input that requires gradients."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", False))


def _cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Detach the hidden state that enters a block."""
    hidden = first_tensor(args, kwargs)
    if hidden is None or not hidden.requires_grad:
        return None
    return replace_tensor(args, kwargs, hidden, hidden.detach())


def _mend(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Ask for the gradient of the hidden state: reentrant checkpointing gives a block's weights none without.

    Looked at in each pass, because checkpointing may be switched on after freezing.
    """
    hidden = first_tensor(args, kwargs)
    if hidden is None or hidden.requires_grad or not torch.is_grad_enabled() or not _is_reentrant(block):
        return None
    return replace_tensor(args, kwargs, hidden, hidden.detach().requires_grad_(True))
