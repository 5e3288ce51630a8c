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
from frostline.cache.ahead import Lookout
from frostline.cache.codecs import CODECS
from frostline.cache.cost import Cost, Price, price_of
from frostline.cache.form import Form
from frostline.cache.hooks import Hooks
from frostline.cache.identity import Rows, identify, is_packed, precision_of
from frostline.cache.opening import Opening
from frostline.cache.options import CacheOptions
from frostline.cache.passes import Passes, rows_of, slice_rows
from frostline.cache.plans import Plan, Plans
from frostline.cache.prefix import PrefixDigest, PrefixWatch
from frostline.cache.store import MemoryStore, Record, Store
from frostline.cache.tiers import Tiers, disk_of, tiers_of
from frostline.clock import Clock
from frostline.trace import Call

__all__ = ["CacheManager"]

logger = logging.getLogger("frostline")


class CacheManager:
    """Caches the boundary activations of ``stack``'s model while it trains.

    Args:
        stack: where the model can be cut.
        options: where records are kept, and how many.
        clock: of the run. After an epoch without one hit, the inputs never repeat and caching stops.
        report: takes an action and its numbers (``cache`` events of the log).
        limit: takes a code and a message: what cannot be cached, and why (law 8).
        compiled: what ``torch.compile`` made of the model. It is the one hooked then, outside of the graph; passes
            beside the training pass run the model as it was.
        store: in place of what the options say (tests).
    """

    def __init__(
        self,
        stack: BlockStack,
        options: CacheOptions,
        clock: Clock,
        *,
        report: Callable[..., None],
        limit: Callable[[str, str], None],
        compiled: nn.Module | None = None,
        store: Store | None = None,
    ) -> None:
        self.stack = stack
        self.store: Store = store if store is not None else MemoryStore(0)
        self._options, self._opened = options, store is not None
        self._form = Form(CODECS[options.codec])
        self._digest, self._watch, self._cost = PrefixDigest(stack), PrefixWatch(), Cost()
        self._plans, self._lookout, self._clock, self._compiled = Plans(), Lookout(), clock, compiled
        self._opening = Opening(options, self._digest, self._plans.run, limit)
        self.depth = 0
        self.counts: Counter[str] = Counter()
        self.stopped: str | None = None
        self._report, self._limit = report, limit
        self._hooks = Hooks(self._serve, self.stop)
        self._passes: Passes | None = None
        self._checked = False
        self._enterable: set[int] = set()  # depths at which the last check has seen that a pass may enter
        self._padding_safe: bool | None = None  # None: no batch with padding has been seen
        self._padding_depth = 0
        self._dtypes: list[torch.dtype] = []  # of the hidden state at each depth down to the line
        self._unknown_since: float | None = None  # the first of the samples in a row that nothing was known of

    # -- what the engine calls -------------------------------------------------------------------------------

    def moved(self, stack: BlockStack, depth: int) -> None:
        """The frost line is at ``depth`` now. Shallower records are upgraded as their samples come by."""
        if stack is self.stack and depth == self.depth:
            return
        self._forget_stale()
        self.counts["dropped"] += self.store.moved(depth)
        if depth < self.depth:
            self._unknown_since, self._cost = None, Cost()
            self._plans.forget()
            self._digest.forget(stack)  # now, when nothing waits to be written under it
        if stack is not self.stack:
            self.stack, self._passes = stack, None
            self._digest.forget(stack)
        self._hooks.uninstall()
        self.depth, self._checked = depth, False
        self._cost.moved()
        self._watch.moved(stack, depth)
        self._follow_plan()

    def agree(self) -> None:
        """After every optimizer step, on every rank: do what rank 0's clock says."""
        try:
            heard = self._plans.agree()
        except Exception as error:  # rank 0, which holds what the ranks say to each other, may be gone already
            logger.debug("cannot hear rank 0", exc_info=True)
            self._limit("cache-ranks", f"rank 0's measurements cannot be heard: {type(error).__name__}: {error}")
            self._plans.deaf = True
            return
        if heard:
            self._follow_plan()

    def expect(self, batch: Any) -> None:
        """A batch that will come soon, as the loader yields it: what is slow to read is read meanwhile."""
        if self._passes is None or not self._hooks.installed or not self.store.reads_ahead or self._lookout.lost:
            return
        main = getattr(self._passes.module, "main_input_name", None)
        try:
            self.store.expect(self._lookout.names(batch, main, padding_safe=bool(self._padding_safe)))
        except Exception:  # whatever a loader yields must not cost the run
            logger.debug("cannot read ahead", exc_info=True)
            self._lookout.give_up()

    def stop(self, code: str, reason: str) -> None:
        """Give up caching for the rest of the run, and say why; the run goes on without."""
        self._end(reason)
        self._limit(f"cache-{code}", f"caching stopped: {reason}")

    def _end(self, reason: str) -> None:
        self.stopped = reason
        self._hooks.uninstall()
        self.store.close()
        self.store = MemoryStore(0)

    def close(self) -> None:
        """Take every hook away, and keep only the records that the options say."""
        self._hooks.uninstall()
        self.store.close()

    def state_dict(self) -> dict[str, Any]:
        """What the clock has decided: a resumed run takes it over instead of measuring again (law 4)."""
        return {"stopped": self.stopped, "plans": self._plans.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`; records are found again by themselves, or made again."""
        self._plans.load_state_dict(state.get("plans", {}))
        if state["stopped"] is not None and self.stopped is None:
            self._end(state["stopped"])
        self._follow_plan()

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

    # -- a batch ---------------------------------------------------------------------------------------------

    def _serve(self, module: nn.Module, call: Call) -> tuple[Passes, int, Tensor] | None:
        """Where a batch may start, and with what; ``None`` where it has to run as it is."""
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
            self.store, self._opened = self._opening.tiers(self.stack, self.depth), True
            self._follow_plan()
            if not self._hooks.installed:
                return None
        self._forget_stale()
        precision = precision_of(call)
        named = identify(call, rows, padding_safe=bool(self._padding_safe), precision=precision)
        if not self._checked and not self._check(self._passes, call, named):
            return None
        if named.padded and self._padding_safe is not False and self._padding_depth != self.depth:
            self._check_padding(self._passes, call, named)
            named = identify(call, rows, padding_safe=bool(self._padding_safe), precision=precision)
        self._lookout.came(call, named.keys[0])
        if self._lookout.lost:
            self._limit("cache-ahead", "the loader yields other inputs than the model gets: nothing is read ahead")
        if self._options.mode == "auto" and not self._pays(self._passes, call, named):
            return None
        if not self._checked and not self._check(self._passes, call, named):  # a disk has joined, with older records
            return None
        hidden = self._assemble(self._passes, call, named)
        self._prove()
        if not self._hooks.installed:
            return None
        self._look_for_trouble()
        return self._passes, self.depth, hidden

    def _look_for_trouble(self) -> None:
        unknown = self._clock.samples - self._unknown_since if self._unknown_since is not None else 0
        read = self.counts["hits"] + self.counts["upgrades"]
        full = self.counts["full"] > self.store.skipped
        if self.store.failure is not None:
            self._limit("cache-writing", f"no more boundary activations are written: {self.store.failure}")
        if unknown > self._clock.samples_per_epoch and self.store.records:
            self.stop("no-hits", "for a whole epoch no sample came by a second time with the same input (augmentation "
                      "or masking makes each one new)")  # fmt: skip
        elif full and not read and not self._clock.sized:
            self.stop("no-hits", "the data have no epochs, and no sample has come by a second time before there was no "
                      "more room")  # fmt: skip
        elif (full or self.store.lost) and not self.store.records and not self._may_get_disk():
            self.stop("no-room", "the budgets have no room for a single record")

    def _may_get_disk(self) -> bool:
        plan = self._plans.of(self.depth)
        open_question = plan is None or plan.disk is None
        return self._options.mode == "auto" and open_question and disk_of(self.store) is None

    def _assemble(self, passes: Passes, call: Call, named: Rows) -> Tensor:
        """Group the rows by the depth of their record, bring each group to the line, and join them."""
        started = time.perf_counter()
        records = self.store.get_many(named.keys)
        looked = time.perf_counter() - started
        groups: dict[int, list[int]] = {}
        for row, record in enumerate(records):
            groups.setdefault(self._entry(record), []).append(row)
        whole = list(range(len(records)))
        if groups.keys() != {0}:
            self._unknown_since = None
        elif self._unknown_since is None:
            self._unknown_since = self._clock.samples
        if groups.keys() == {self.depth}:
            self.counts["hits"] += len(whole)
            with self._cost.reading(len(whole), looked):
                return self._join(records, whole, named, self.depth)
        joined: Tensor | None = None
        for depth, rows in sorted(groups.items()):
            before = self._join([records[row] for row in rows], rows, named, depth) if depth else None
            timed = self._cost.computing(len(rows)) if depth == 0 and len(rows) == len(whole) else nullcontext()
            with timed:
                part = passes.prefill(slice_rows(call, rows, len(whole)), self.depth, depth, before)
            if depth < self.depth and (self._clock.epochs_left > 0 or self._options.keep):
                for taken in self._form.keep(self.store, part, rows, named, self.depth):
                    self.counts["written" if taken else "full"] += 1
            self.counts["hits" if depth == self.depth else "upgrades" if depth else "misses"] += len(rows)
            if len(rows) == len(whole):
                return part
            if joined is None:
                joined = part.new_zeros((len(whole), *part.shape[1:]))
            joined[torch.as_tensor(rows, device=part.device)] = part
        assert joined is not None
        return joined

    def _entry(self, record: Record | None) -> int:
        """Where a row enters: at its record's depth, or at 0."""
        if record is None or record.depth > self.depth:
            return 0
        if record.depth < self.depth and record.depth not in self._enterable:
            self._checked = False  # another rank has come with it: with the next batch it is seen whether a pass may
            return 0
        return record.depth

    def _join(self, records: list[Record | None], rows: list[int], named: Rows, depth: int) -> Tensor:
        device = next(self.stack.model.parameters()).device
        return self._form.join([r for r in records if r is not None], rows, named, self._dtypes[depth], device)

    # -- what pays -------------------------------------------------------------------------------------------

    def _pays(self, passes: Passes, call: Call, named: Rows) -> bool:
        """At each depth anew: is keeping records worth it, and on disk too once memory is full? (mode ``auto``)"""
        plan = self._plans.of(self.depth)
        if plan is None and not self._plans.awaits(self.depth):
            price = self._price(passes, call, named, self._opening.memory(self.store.device))
            # Records of a shallower line pay once more even if their upgrades are not kept.
            visits = self._clock.epochs_left + bool(self.store.records)
            self._tell(price, visits, "memory", Plan(keep=price.pays(visits)))
        elif plan is not None and self.counts["full"] and self._may_get_disk() and not self._plans.awaits(self.depth):
            self._price_disk(passes, call, named, plan)
        return self._hooks.installed

    def _price_disk(self, passes: Passes, call: Call, named: Rows, plan: Plan) -> None:
        if (disk := self._opening.disk(self.stack, self.depth, trial=True)) is None:
            self._settle(plan._replace(disk=False))
            return
        price = self._price(passes, call, named, disk)
        visits = self._clock.epochs_left
        self._tell(price, visits, "disk", plan._replace(disk=price.pays(visits)))

    def _price(self, passes: Passes, call: Call, named: Rows, store: Store) -> Price:
        """What a sample costs with its record in ``store``, which is closed then."""
        rows = list(range(len(named.keys)))
        try:
            line = passes.prefill(call, self.depth)
            return price_of(
                len(rows),
                store,
                compute=lambda: passes.prefill(call, self.depth),
                write=lambda: self._form.keep(store, line, rows, named, self.depth),
                find=lambda: store.get_many(named.keys),
                join=lambda records: self._join(records, rows, named, self.depth),
            )
        finally:
            store.close()

    def _tell(self, price: Price, visits: float, tier: str, plan: Plan) -> None:
        self._report("price", depth=self.depth, tier=tier, visits=visits, **price._asdict(), **plan._asdict())
        self._settle(plan)

    def _prove(self) -> None:
        """Once the first batches have been read at a depth: is that faster than computing them? (every mode)"""
        plan, cost = self._plans.of(self.depth), self._cost.numbers()
        if cost is None or (plan is not None and plan.proved):
            return
        self._report("cost", depth=self.depth, **cost)
        pays = cost["reading"] <= cost["computing"]
        if not pays:
            each = [f"{1e3 * cost[name]:.2g} ms" for name in ("reading", "computing")]
            self._limit(
                "cache-slow",
                f"not cached at depth {self.depth}: reading a sample takes {each[0]}, computing it again {each[1]}",
            )
        self._settle(Plan(pays, plan.disk if plan is not None else None, proved=True))

    def _settle(self, plan: Plan) -> None:
        if self._plans.propose(self.depth, plan):
            self._follow_plan()

    def _follow_plan(self) -> None:
        """Install or take away what the plan for this depth says."""
        plan = self._plans.of(self.depth)
        wanted = self.depth > 0 and self.stopped is None and (plan is None or plan.keep)
        if plan is not None and not plan.keep:
            self.store.clear()  # reading it would be slower at a deeper line, too
        if wanted and plan is not None and plan.disk and self._opened and disk_of(self.store) is None:
            disk = self._opening.disk(self.stack, self.depth)
            self.store = self.store if disk is None else Tiers(*tiers_of(self.store), disk)
            self._checked = False  # it may bring records of other depths
        if wanted and not self._hooks.installed:
            around = self.stack.ancestors() if self._compiled is None else [self._compiled]
            self._hooks.install(around, self.stack.model if self._compiled is not None else None)
        elif not wanted:
            self._hooks.uninstall()

    # -- gates -----------------------------------------------------------------------------------------------

    def _check(self, passes: Passes, call: Call, named: Rows) -> bool:
        """Before the first hit at a depth: is the boundary activation the same each time, and skipping exact?"""
        started = time.perf_counter()
        self._enterable = self.store.depths()
        found = gates.check(passes, call, named, self.depth, self._enterable, self._form.codec)
        self._report("check", depth=self.depth, seconds=time.perf_counter() - started, **found.numbers())
        self._dtypes = found.dtypes
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
        self._padding_safe, self._padding_depth, self._form.unpadded = safe, self.depth, safe

    def _forget_stale(self) -> None:
        """Forget every record if a weight or buffer of the prefix is not what it was."""
        first = not self._watch.looked
        if self._watch.changed():
            self.counts["stale"] += self.store.records
            self._report("stale", depth=self.depth, records=self.store.records)
            self.store.clear()
            self._digest.forget(self.stack)
            self.store.clear()  # what another rank has told meanwhile was taken for one of the new weights
            self._checked, self._unknown_since = False, None
        elif first:  # since the line moved a host may have loaded weights, DDP has sent rank 0's buffers around
            self._digest.forget(self.stack)
