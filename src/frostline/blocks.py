"""``BlockStack``: the stem, the ordered blocks and the head of any model.

There is no table of model names. The stack is the largest homogeneous ``ModuleList`` (or ``Sequential`` of
stages, flattened to residual blocks); what stands outside it is told apart by what autograd reaches from the
input of each block in one tiny forward pass (:mod:`frostline.trace`). Where no such pass is possible (a plain
module whose inputs are unknown) the order of registration decides until the first real batch is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from frostline.distributed.shards import put_back
from frostline.errors import ModelError, choices_message
from frostline.trace import Call, Trace, trace_model, unwrap

__all__ = ["BlockStack", "Owner"]

Owner = int | Literal["stem", "head"]

# A second stack this large beside the first (a decoder beside an encoder) makes the choice worth a word.
_RIVAL_SHARE = 0.25


@dataclass
class BlockStack:
    """Where a model can be cut. Build it with :meth:`find`.

    Attributes:
        model: the unwrapped model.
        path: dotted path of the list that holds the blocks.
        blocks: the N blocks, input to output.
        block_paths: their dotted paths.
        owners: parameter name -> ``"stem"``, ``"head"`` or the block index i it freezes with (depth > i).
        limits: what cannot be done for this model, in words (law 8).
        traced: whether owners come from a forward pass (else from the order of registration).
        noisy_parents: code outside the blocks is random in train mode (SpecAugment, LayerDrop, a dropout
            that the prefix shares with the head): the whole model must be in eval mode up to the boundary.
        stem_extras: modules without parameters that run before block 0 only (an embedding dropout).
    """

    model: nn.Module
    path: str
    blocks: list[nn.Module]
    block_paths: list[str]
    owners: dict[str, Owner]
    limits: list[str] = field(default_factory=list)
    traced: bool = False
    noisy_parents: bool = False
    stem_extras: list[nn.Module] = field(default_factory=list)

    @classmethod
    def find(cls, model: nn.Module, path: str | None = None, inputs: Call | None = None) -> BlockStack:
        """Find the stack of ``model``.

        Args:
            model: any module; DDP, ``torch.compile`` and the like are looked through.
            path: dotted path of the list of blocks, where the model has several or none is found.
            inputs: positional and keyword arguments of one forward pass, where they cannot be made up.

        Raises:
            ModelError: no stack, one shared block, fewer than two blocks, or a path that matches nothing.
        """
        model = unwrap(model)
        put_back(model)
        limits: list[str] = []
        stack_path = path if path is not None else _largest(model, limits)
        paths = _block_paths(model, stack_path)
        modules = dict(model.named_modules())
        blocks = [modules[p] for p in paths]
        trace = trace_model(model, blocks, inputs)
        if trace is not None:
            _refuse_shared(paths, trace)
        owners = _owners(model, paths, trace)
        stack = cls(model, stack_path, blocks, paths, owners, limits)
        if trace is not None:
            stack.traced, stack.noisy_parents = True, trace.noisy
            stack.stem_extras = list(trace.before_only)
        limits.extend(_shared_tensors(model, owners))
        return stack

    def __len__(self) -> int:
        return len(self.blocks)

    def owner(self, name: str) -> Owner:
        """What the parameter ``name`` freezes with."""
        return self.owners[name]

    def parameters_of(self, owner: Owner) -> dict[str, nn.Parameter]:
        """The parameters that freeze with the stem, with block i, or never (the head)."""
        return {n: p for n, p in self.model.named_parameters() if self.owners[n] == owner}

    def prefix_parameters(self, depth: int) -> dict[str, nn.Parameter]:
        """Every parameter below the frost line at ``depth`` (the stem included when ``depth`` >= 1)."""
        return {n: p for n, p in self.model.named_parameters() if self._below(n, depth)}

    def prefix_modules(self, depth: int) -> list[nn.Module]:
        """The outermost modules that lie wholly below the frost line: the ones that run in eval mode."""
        if depth == 0:
            return []
        inside = {n for n in self.owners if self._below(n, depth)}
        found = [module for _, module in _outermost(self.model, inside)]
        known = {id(m) for top in found for m in top.modules()}
        return found + [m for m in self.stem_extras if id(m) not in known]

    def paths_of(self, owner: Literal["stem", "head"]) -> tuple[str, ...]:
        """Dotted paths of the outermost modules that hold only stem (or only head) parameters."""
        return tuple(p for p, _ in _outermost(self.model, {n for n, o in self.owners.items() if o == owner}))

    def ancestors(self) -> list[nn.Module]:
        """Every module around the stack, the model first: a loop may call an inner one only (Lightning)."""
        parts = self.path.split(".")
        return [self.model.get_submodule(".".join(parts[:length])) for length in range(len(parts))]

    def _below(self, name: str, depth: int) -> bool:
        owner = self.owners[name]
        return depth > 0 and (owner == "stem" or (isinstance(owner, int) and owner < depth))


def _outermost(model: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules all of whose parameters (at least one) are among ``names``."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            child_path = f"{path}{child_name}"
            own = [f"{child_path}.{n}" for n, _ in child.named_parameters(remove_duplicate=False)]
            known = [n for n in own if n in names or n not in canonical]
            if own and len(known) == len(own) and any(n in names for n in own):
                yield child_path, child
            elif own:
                yield from walk(child, f"{child_path}.")

    canonical = {n for n, _ in model.named_parameters()}
    return walk(model, "")


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _largest(model: nn.Module, limits: list[str]) -> str:
    """The path of the stack: the first of the large homogeneous lists."""
    candidates: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        children = list(module.children())
        if not _is_list(module) or len(children) < 2 or len({type(c) for c in children}) > 1 or not _size(module):
            continue
        if any(path.startswith(f"{outer}.") for outer in candidates):
            continue  # a list inside a block (experts, inner convolutions) is part of that block
        candidates[path] = module
    if not candidates:
        shared = _shared_block(model)
        raise ModelError(
            f"{type(model).__name__} runs its one block {shared[0]!r} {shared[1]} times: a shared block cannot be "
            "frozen by depth; use policy 'none', or a model with a block of its own at each depth"
            if shared
            else f"{type(model).__name__} has no list of two or more blocks of one class to freeze by depth; name the "
            f"ModuleList or Sequential that holds its blocks with blocks='dotted.path' (lists in this model: "
            f"{', '.join(p for p, m in model.named_modules() if p and _is_list(m)) or 'none'})"
        )
    largest = max(_size(m) for m in candidates.values())
    rivals = [p for p, m in candidates.items() if _size(m) >= _RIVAL_SHARE * largest]
    if len(rivals) > 1:
        limits.append(
            f"{len(rivals)} stacks of blocks: {', '.join(rivals)}; freezing works on the first, {rivals[0]!r} "
            "(choose another with blocks='dotted.path')"
        )
    return rivals[0]


def _shared_block(model: nn.Module) -> tuple[str, int] | None:
    """A module in a list that one forward pass runs more than once, and how often."""
    inside = {
        p: m for p, m in model.named_modules() if "." in p and _is_list(model.get_submodule(p.rpartition(".")[0]))
    }
    trace = trace_model(model, list(inside.values()), None)
    if trace is None:
        return None
    repeated = [(path, n) for path, n in zip(inside, trace.calls, strict=True) if n > 1]
    return max(repeated, key=lambda item: _size(inside[item[0]])) if repeated else None


def _block_paths(model: nn.Module, stack_path: str) -> list[str]:
    """Dotted paths of the blocks in ``stack_path``; a stage that is a chain gives its residual blocks."""
    modules = dict(model.named_modules())
    lists = [p for p, m in modules.items() if p and _is_list(m)]
    if stack_path not in modules:
        raise ModelError(choices_message(f"block path in {type(model).__name__}", stack_path, lists))
    if not _is_list(modules[stack_path]):
        raise ModelError(
            f"blocks={stack_path!r} is a {type(modules[stack_path]).__name__}, not a ModuleList, Sequential or "
            f"ModuleDict of blocks. Valid choices: {', '.join(lists) or '(none)'}"
        )
    prefix = f"{stack_path}." if stack_path else ""
    paths = [p for name, child in modules[stack_path].named_children() for p in _flat(f"{prefix}{name}", child)]
    if len(paths) < 2:
        raise ModelError(f"blocks={stack_path!r} holds {len(paths)} block(s); freezing by depth needs at least two")
    return paths


def _flat(path: str, stage: nn.Module) -> Iterable[str]:
    """A stage whose parameters sit in one ``Sequential`` of equal blocks is a chain by construction: take those."""
    chains = [("", stage)] if isinstance(stage, nn.Sequential) else list(stage.named_children())
    for name, chain in chains:
        links = list(chain.named_children())
        if isinstance(chain, nn.Sequential) and links and len({type(m) for _, m in links}) == 1:
            # More than one link class would be a layer list (conv, norm, act), not a chain of residual blocks.
            residual = any(list(m.children()) for _, m in links)
            if residual and _size(chain) >= 0.5 * _size(stage):
                base = f"{path}.{name}" if name else path
                return [f"{base}.{link}" for link, _ in links]
    return [path]


def _refuse_shared(paths: list[str], trace: Trace) -> None:
    for path, calls in zip(paths, trace.calls, strict=True):
        if calls > 1:
            raise ModelError(
                f"block {path!r} runs {calls} times in one forward pass: a shared block cannot be frozen by depth"
            )


def _owners(model: nn.Module, paths: list[str], trace: Trace | None) -> dict[str, Owner]:
    owners: dict[str, Owner] = {}
    seen_block = False
    for name, parameter in model.named_parameters():
        index = next((i for i, p in enumerate(paths) if name.startswith(f"{p}.")), None)
        if index is not None:
            owners[name], seen_block = index, True
        elif trace is None or not any(id(parameter) in reach for reach in (*trace.reach, trace.used)):
            owners[name] = "head" if seen_block else "stem"  # not traced, or not used in this pass (a mask token)
        else:
            # First block whose input this parameter reaches. What reaches block 1 but not block 0 feeds every
            # block from outside (a shared position bias): it must stand still with block 0, so it is stem.
            first = next((i for i, reach in enumerate(trace.reach) if id(parameter) in reach), None)
            owners[name] = "head" if first is None else "stem" if first <= 1 else first - 1
    return owners


def _shared_tensors(model: nn.Module, owners: Mapping[str, Owner]) -> list[str]:
    """Say which tensors have a second life outside the place they freeze with (tied embeddings)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    notes = []
    for same in names.values():
        owner = owners[same[0]]
        if len(same) > 1 and owner != "head":
            where = "the stem" if owner == "stem" else f"block {owner}"
            notes.append(
                f"{', '.join(same[1:])} is the same tensor as {same[0]}: it freezes with {where}, from depth "
                f"{1 if owner == 'stem' else owner + 1} on (untie them to keep it training)"
            )
    return notes
