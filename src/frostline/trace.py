"""One tiny forward pass that shows how a model runs: what feeds each block, and what is random outside them.

Nothing of it is left behind: hooks are removed, train flags, ``requires_grad``, buffers and the random state are
put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from frostline.distributed.shards import is_split, put_back, start_over

__all__ = [
    "Call",
    "Trace",
    "first_tensor",
    "has_compiled",
    "is_compiled",
    "made_up_call",
    "random_state_kept",
    "replace_tensor",
    "trace_model",
    "undisturbed",
    "unwrap",
]


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` went through ``torch.compile``, as a wrapper or in place."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def has_compiled(model: nn.Module) -> bool:
    """Whether ``model``, or any module in it (a block, say), went through ``torch.compile``."""
    return any(is_compiled(module) for module in model.modules())


def unwrap(model: nn.Module) -> nn.Module:
    """Look through DDP, ``DataParallel`` and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@dataclass
class Trace:
    """What one pass showed.

    ``calls[i]``: how often block i ran. ``reach[i]``: ids of the parameters that autograd reaches from the
    input of block i, ``used`` those it reaches from the output. ``before_only``: childless modules without
    parameters that ran before block 0 and never after. ``noisy``: the input of the last block differs between
    two passes in train mode although every block and the stem are in eval mode.
    """

    calls: list[int]
    reach: list[set[int]]
    used: set[int] = field(default_factory=set)
    before_only: list[nn.Module] = field(default_factory=list)
    noisy: bool = False


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden state that enters a block: its first floating tensor argument, ``[batch, ...]``."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def replace_tensor(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], old: torch.Tensor, new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with ``new`` wherever ``old`` itself stands."""
    return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}


Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def trace_model(model: nn.Module, blocks: list[nn.Module], inputs: Call | None) -> Trace | None:
    """Trace ``model`` on ``inputs`` (positional and keyword arguments of one forward pass).

    Without ``inputs`` one random row is made up for the outermost module around the blocks that says what its
    main input is; ``None`` where there is none, or where it cannot be run so.
    """
    call, outermost = inputs, model
    if call is None:
        model, call = made_up_call(model, blocks)
        # A model that is split over ranks takes the first module that it runs for its root, once and for all.
        if call is None or (model is not outermost and is_split(model)):
            return None
    with undisturbed(model, blocks):
        model.eval()
        try:
            seen = _pass(model, blocks, call)
        except Exception:
            # Made-up inputs do not fit every model; the caller falls back to the order of registration.
            if inputs is not None:
                raise
            start_over(model)
            return None
        put_back(model)
        stem = {id(p) for p in model.parameters()} & (seen.reach[1] if len(seen.reach) > 1 else set())
        seen.noisy = _is_noisy(model, blocks, call, stem, seen.before_only)
    return seen


def _pass(model: nn.Module, blocks: list[nn.Module], call: Call) -> Trace:
    seen = Trace([0] * len(blocks), [set() for _ in blocks])
    before: dict[int, nn.Module] = {}
    after: set[int] = set()

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.calls[index] += 1
            hidden = first_tensor(args, kwargs)
            if hidden is not None and seen.calls[index] == 1:
                seen.reach[index] = _reached(hidden)

        return hook

    def note(module: nn.Module, _: Any) -> None:
        if any(seen.calls):
            after.add(id(module))
        else:
            before[id(module)] = module

    # What is split over ranks is computed with as copies, gathered for the length of a module's own pass.
    own = {m: {n: id(p) for n, p in m.named_parameters(recurse=False)} for m in model.modules()}
    copies: dict[int, int] = {}

    def gathered(module: nn.Module, _: Any) -> None:
        copies.update((id(p), own[module][n]) for n, p in module.named_parameters(recurse=False))

    leaves = [m for m in model.modules() if not list(m.children()) and not list(m.parameters(recurse=False))]
    handles = [b.register_forward_pre_hook(enter(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [m.register_forward_pre_hook(note) for m in leaves]
    if is_split(model):
        handles += [m.register_forward_pre_hook(gathered) for m, named in own.items() if named]
    try:
        with torch.enable_grad():
            seen.used = _reached_from_any(model(*call[0], **call[1]))
    finally:
        for handle in handles:
            handle.remove()
    seen.reach = [{copies.get(key, key) for key in reach} for reach in seen.reach]
    seen.used = {copies.get(key, key) for key in seen.used}
    seen.before_only = [m for key, m in before.items() if key not in after]
    return seen


def _is_noisy(model: nn.Module, blocks: list[nn.Module], call: Call, stem: set[int], extras: list[nn.Module]) -> bool:
    """Run the prefix in train mode, with stem and blocks in eval mode, and compare what reaches the last block."""
    outputs: list[torch.Tensor | None] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = first_tensor(args, kwargs)
        outputs[-1] = None if hidden is None else hidden.detach().clone()

    model.train()
    for module in (*blocks, *extras):
        module.eval()
    for module in model.modules():
        own = list(module.parameters())
        if own and all(id(p) in stem for p in own):
            module.eval()
    handle = blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(Exception):
            for _ in range(4):
                outputs.append(None)
                model(*call[0], **call[1])
    finally:
        handle.remove()
    # A pass that did not reach the last block (LayerDrop) differs from one that did.
    first = outputs[0] if outputs else None
    return len(outputs) < 4 or any((o is None) != (first is None) or not _same(o, first) for o in outputs[1:])


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _reached_from_any(output: Any) -> set[int]:
    """Ids of the leaf tensors behind any tensor of a model's output."""
    if isinstance(output, torch.Tensor):
        return _reached(output)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return set().union(*(_reached_from_any(value) for value in values))


def _reached(tensor: torch.Tensor) -> set[int]:
    """Ids of the leaf tensors in the graph behind ``tensor``."""
    found: set[int] = set()
    visited: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


@contextmanager
def undisturbed(model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Put back flags, ``requires_grad``, buffers and the random state."""
    training = [(m, m.training) for m in model.modules()]
    # model.compile() would trace the hooks of this pass, and compile them.
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    inside = {id(p) for b in blocks for p in b.parameters()}
    outside = [(p, p.requires_grad) for p in model.parameters() if id(p) not in inside and p.is_floating_point()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with random_state_kept():
        try:
            for module, _ in compiled:
                module._compiled_call_impl = None
            for parameter, _ in outside:
                parameter.requires_grad_(True)
            yield
        finally:
            put_back(model)
            for module, call in compiled:
                module._compiled_call_impl = call
            for module, flag in training:
                module.training = flag
            for parameter, flag in outside:
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the random state: torch's, and numpy's global one, from which SpecAugment draws its masks.

    Some models draw a number per block even in eval mode (Wav2Vec2's layer drop).
    """
    import numpy as np

    state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(state)


def made_up_call(
    model: nn.Module, blocks: list[nn.Module], rows: int = 1, length: int = 8
) -> tuple[nn.Module, Call | None]:
    """The module to run and random input for it (all models of ``transformers`` name their main input).

    ``rows`` samples; ``length`` is in tokens and holds for text only (images and audio have the size that the
    configuration names). ``None`` where no input can be made up.
    """
    for inner in model.modules():
        main, config = getattr(inner, "main_input_name", None), getattr(inner, "config", None)
        if isinstance(main, str) and config is not None and _holds(inner, blocks):
            break
    else:
        return model, None
    some = next((p for p in inner.parameters() if p.is_floating_point()), None)
    if some is None or some.is_meta:
        return inner, None
    value = _made_up(main, config, torch.Generator().manual_seed(0), rows, length)
    if value is None:
        return inner, None
    call: dict[str, Any] = {main: value.to(some.device, some.dtype if value.is_floating_point() else value.dtype)}
    names = inspect.signature(inner.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        call["decoder_input_ids"] = torch.ones(rows, length, dtype=torch.long, device=some.device)
    if "use_cache" in names:
        call["use_cache"] = False
    return inner, ((), call)


def _holds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    inside = {id(m) for m in module.modules()}
    return all(id(b) in inside for b in blocks)


def _made_up(main: str, config: Any, generator: torch.Generator, rows: int, length: int) -> torch.Tensor | None:
    if main == "input_ids":
        vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        if vocabulary < 2:
            return None
        ids = torch.randint(vocabulary // 2, vocabulary, (rows, length), generator=generator)
        eos = getattr(config, "eos_token_id", None)
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(eos, int) and eos < vocabulary:  # some classification heads read the state at this token
            ids[:, -1] = eos
        return ids
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
    if main == "input_values":
        return torch.randn(rows, 16_000, generator=generator)
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        return torch.randn(rows, config.num_mel_bins, frames, generator=generator)
    return None
