"""The storage manager: feeds boundary activations of earlier epochs back into the forward pass.

The published design (AutoFreeze, section 3.3, arXiv 2102.01386) latches the depth when an epoch starts and reads in
the next one. Here a record is written as soon as its sample passes a frozen prefix, a batch may mix samples with
records of different depths and without any, and a record is upgraded when its sample comes by after the line moved.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from frostline.blocks import BlockStack
from frostline.cache import gates
from frostline.cache.cost import Cost
from frostline.cache.identity import Rows, identify, is_packed
from frostline.cache.options import CacheOptions
from frostline.cache.passes import Passes, rows_of, slice_rows
from frostline.cache.store import HostStore, Record, Store
from frostline.cache.tiers import PrefixDigest, Tiers, open_disk, open_host
from frostline.errors import ModelError
from frostline.trace import Call

__all__ = ["CacheManager"]

logger = logging.getLogger("frostline")


class CacheManager:
    """Caches the boundary activations of ``stack``'s model while it trains.

    Args:
        stack: where the model can be cut.
        options: where records are kept, and how many.
        samples_per_epoch: after so many samples without one hit, the inputs never repeat and caching stops.
        report: takes an action and its numbers (``cache`` events of the log).
        limit: takes a code and a message: what cannot be cached, and why (law 8).
        store: in place of what the options say (tests).
    """

    def __init__(
        self,
        stack: BlockStack,
        options: CacheOptions,
        *,
        samples_per_epoch: int,
        report: Callable[..., None],
        limit: Callable[[str, str], None],
        store: Store | None = None,
    ) -> None:
        self.stack = stack
        self.store: Store = store if store is not None else HostStore(0)
        self._options, self._opened = options, store is not None
        self._digest, self._cost = PrefixDigest(stack), Cost()
        self.depth = 0
        self.counts: Counter[str] = Counter()
        self.stopped: str | None = None
        self._samples_per_epoch, self._report, self._limit = samples_per_epoch, report, limit
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._passes: Passes | None = None
        self._inside: nn.Module | None = None
        self._checked = False
        self._padding_safe: bool | None = None  # None: no batch with padding has been seen
        self._padding_depth = 0
        self._prefix: list[Tensor] = []
        self._buffers: dict[int, Tensor] = {}
        self._versions: list[tuple[int, int]] = []
        self._busy = False
        self._unknown_in_a_row = 0

    # -- what the engine calls -------------------------------------------------------------------------------

    def moved(self, stack: BlockStack, depth: int) -> None:
        """The frost line is at ``depth`` now. Shallower records are upgraded as their samples come by."""
        if stack is self.stack and depth == self.depth:
            return
        if self._versions:
            self._forget_stale()
        if depth < self.depth:
            self._unknown_in_a_row = 0
            self._digest.forget(stack)
            self._cost = Cost()
            self.counts["dropped"] += self.store.drop_deeper(depth)
        if stack is not self.stack:
            self.stack, self._passes = stack, None
            self._digest.forget(stack)
        self._uninstall()
        self.depth, self._checked = depth, False
        self._cost.moved()
        self._versions = []
        buffers = [b for m in stack.prefix_modules(depth) for b in m.buffers()]
        self._buffers = dict(enumerate(buffers))
        self._prefix = [*buffers, *stack.prefix_parameters(depth).values()]
        if depth and self.stopped is None:
            self._install()

    def stop(self, code: str, reason: str) -> None:
        """Give up caching for the rest of the run, and say why; the run goes on without."""
        self._end(reason)
        self._limit(f"cache-{code}", f"caching stopped: {reason}")

    def _end(self, reason: str) -> None:
        self.stopped = reason
        self._uninstall()
        self.store.close()
        self.store = HostStore(0)

    def close(self) -> None:
        """Take every hook away, and keep only the records that the options say."""
        self._uninstall()
        self.store.close()

    def state_dict(self) -> dict[str, Any]:
        """What the clock has decided: a resumed run takes it over instead of measuring again (law 4)."""
        return {"stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; records are found again by themselves, or made again."""
        if state["stopped"] is not None and self.stopped is None:
            self._end(state["stopped"])

    def summary(self) -> dict[str, Any]:
        """Counts in samples: ``hits`` (read at the line), ``upgrades`` (read below it), ``misses``, ``written``..."""
        names = ("hits", "upgrades", "misses", "written", "full", "dropped", "stale")
        return {
            **{name: self.counts[name] for name in names},
            "torn": self.store.torn,
            "lost": self.store.lost,
            "records": self.store.records,
            "bytes": self.store.nbytes,
            "stopped": self.stopped,
        }

    def _open(self) -> Store:
        host = open_host(self._options)
        if self._options.mode == "memory":
            return host
        try:
            return Tiers(host, open_disk(self._options, self.stack, self._digest))
        except OSError as error:
            self._limit("cache-disk", f"no boundary activations on disk, only in memory: {error}")
            return host

    # -- hooks -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        # First of all hooks: the freezer's put the model in eval mode, and what runs here must find it in train mode.
        for ancestor in self.stack.ancestors():
            self._handles.append(ancestor.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            self._handles.append(ancestor.register_forward_hook(self._leave, always_call=True))

    def _uninstall(self) -> None:
        self._leave(self._inside)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside is module:
            self._leave(module)  # an interrupt (Ctrl-C) cut the last pass off before its end
        if self._busy or self._inside is not None or not module.training or not torch.is_grad_enabled():
            return
        self._busy = True
        call: Call = (args, kwargs)
        try:
            hidden = self._serve(module, call)
            if hidden is not None and self._passes is not None:
                self._passes.begin(call, self.depth, hidden)
                self._inside = module
        except ModelError as error:
            self._give_up("model", str(error))
        except Exception as error:
            # Whatever goes wrong here must not cost the run: the uncached pass is always right.
            logger.debug("caching failed", exc_info=True)
            self._give_up("error", f"{type(error).__name__}: {error}")
        finally:
            self._busy = False

    def _give_up(self, code: str, reason: str) -> None:
        if self._passes is not None:
            self._passes.end()
        self.stop(code, reason)

    def _leave(self, module: nn.Module | None, *_: Any) -> None:
        if self._inside is not None and self._inside is module:
            assert self._passes is not None
            self._passes.end()
            self._inside = None

    # -- a batch ---------------------------------------------------------------------------------------------

    def _serve(self, module: nn.Module, call: Call) -> Tensor | None:
        """The boundary activation ``[rows, ...]`` of a batch, or ``None`` where it has to run as it is."""
        rows = rows_of(call, getattr(module, "main_input_name", None))
        if gates.wants_inner_states(module, call):
            self._limit(
                "cache-inner-states", "hidden states or attentions of every block are asked for: no block is skipped"
            )
            return None
        if not rows:
            return None
        if self._passes is None or self._passes.module is not module:
            self._passes, self._checked = Passes(self.stack, module), False
        if is_packed(call):
            self.stop("packed", "a flattened batch packs several samples into a row: its rows cannot be told apart")
            return None
        if not self._opened:  # not before: a host may load other weights after it has frozen the first blocks
            self.store, self._opened = self._open(), True
        self._forget_stale()
        named = identify(call, rows, padding_safe=bool(self._padding_safe))
        if not self._checked and not self._check(self._passes, call, named):
            return None
        if named.padded and self._padding_safe is not False and self._padding_depth != self.depth:
            self._check_padding(self._passes, call, named)
            named = identify(call, rows, padding_safe=bool(self._padding_safe))
        hidden = self._assemble(self._passes, call, named)
        if (cost := self._cost.numbers()) is not None:
            self._report("cost", depth=self.depth, **cost)
            if cost["reading"] > cost["computing"]:
                self.stop("slow", f"reading a sample takes {1e3 * cost['reading']:.2g} ms, computing it again "
                          f"{1e3 * cost['computing']:.2g} ms")  # fmt: skip
                return None
        if self._unknown_in_a_row > self._samples_per_epoch + rows and self.store.records:
            self.stop("no-hits", f"none of {self._unknown_in_a_row} samples came by a second time with the same "
                      "input (augmentation or masking makes each one new)")  # fmt: skip
            return None
        return hidden

    def _assemble(self, passes: Passes, call: Call, named: Rows) -> Tensor:
        """Group the rows by the depth of their record, bring each group to the line, and join them."""
        started = time.perf_counter()
        records = self.store.get_many(named.keys)
        looked = time.perf_counter() - started
        groups: dict[int, list[int]] = {}
        for row, record in enumerate(records):
            groups.setdefault(record.depth if record is not None and record.depth <= self.depth else 0, []).append(row)
        whole = list(range(len(records)))
        self._unknown_in_a_row = self._unknown_in_a_row + len(whole) if groups.keys() == {0} else 0
        if groups.keys() == {self.depth}:
            self.counts["hits"] += len(whole)
            with self._cost.reading(len(whole), looked):
                return self._join([r for r in records if r is not None], whole, named)
        joined: Tensor | None = None
        for depth, rows in sorted(groups.items()):
            kept = [r for r in (records[row] for row in rows) if r is not None]
            before = self._join(kept, rows, named) if depth else None
            timed = self._cost.computing(len(rows)) if depth == 0 and len(rows) == len(whole) else nullcontext()
            with timed:
                part = passes.prefill(slice_rows(call, rows, len(whole)), self.depth, depth, before)
            if depth < self.depth:
                self._keep(part, rows, named)
            self.counts["hits" if depth == self.depth else "upgrades" if depth else "misses"] += len(rows)
            if len(rows) == len(whole):
                return part
            if joined is None:
                joined = part.new_zeros((len(whole), *part.shape[1:]))
            joined[torch.as_tensor(rows, device=part.device)] = part
        assert joined is not None
        return joined

    def _join(self, records: list[Record], rows: list[int], named: Rows) -> Tensor:
        """Records of ``rows`` as one tensor on the model's device, padded to the batch with zeros."""
        first = records[0].value
        if self._padding_safe and named.real is not None:
            joined = first.new_zeros((len(rows), named.real.shape[1], *first.shape[1:]))
            for place, (row, record) in enumerate(zip(rows, records, strict=True)):
                joined[place, named.real_of(row)] = record.value
        else:
            joined = torch.stack([record.value for record in records])
        return joined.to(next(self.stack.model.parameters()).device)

    def _keep(self, hidden: Tensor, rows: list[int], named: Rows) -> None:
        host = hidden.detach().cpu()
        for place, row in enumerate(rows):
            value = host[place]
            if self._padding_safe and named.real is not None:
                value = value[named.real_of(row)]
            kept = self.store.put(named.keys[row], self.depth, value)
            self.counts["written" if kept else "full"] += 1

    # -- gates -----------------------------------------------------------------------------------------------

    def _check(self, passes: Passes, call: Call, named: Rows) -> bool:
        """Before the first hit at a depth: is the boundary activation the same each time, and skipping exact?"""
        started = time.perf_counter()
        found = gates.check(passes, call, named, self.depth, self.store.depths())
        self._report("check", depth=self.depth, seconds=time.perf_counter() - started, **found.numbers())
        self._checked = found.refusal is None
        if found.refusal is not None:
            self.stop("check", found.refusal)
            return False
        return True

    def _check_padding(self, passes: Passes, call: Call, named: Rows) -> None:
        """At each depth anew: do real tokens alone say what crosses the line?"""
        safe = gates.padding_safe(passes, call, named, self.depth)
        self._report("padding", depth=self.depth, safe=safe)
        if self._padding_safe and not safe:  # a block that has just frozen looks at padding: records lack it
            self.store.clear()
        self._padding_safe, self._padding_depth = safe, self.depth

    def _forget_stale(self) -> None:
        """Forget every record if a weight or buffer of the prefix is not what it was."""
        versions = [(tensor.data_ptr(), tensor._version) for tensor in self._prefix]
        if versions == self._versions:
            return
        # DDP writes the buffers of rank 0 over all others' at each step: they have a new version, and the same values.
        changed = [i for i, (a, b) in enumerate(zip(versions, self._versions, strict=False)) if a != b]
        same = all(i in self._buffers and torch.equal(self._buffers[i], self._prefix[i]) for i in changed)
        if self._versions and not same:
            self.counts["stale"] += self.store.records
            self._report("stale", depth=self.depth, records=self.store.records)
            self.store.clear()
            self._digest.forget(self.stack)
            self._checked, self._unknown_in_a_row = False, 0
        self._versions = versions
        self._buffers = {i: self._prefix[i].detach().clone() for i in self._buffers}
