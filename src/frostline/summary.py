"""What a run leaves in one dictionary."""

from __future__ import annotations

from typing import Any

from frostline.memory import MemoryPlan

__all__ = ["Summary"]


class Summary(dict[str, Any]):
    """The summary of a run: a dictionary that prints as a few readable lines."""

    def __str__(self) -> str:
        moves = " -> ".join(f"{m['depth']} (step {m['step']})" for m in self["trajectory"]) or "none"
        lines = [
            f"policy {self['policy']['name']} {self['policy']['options'] or ''}".rstrip(),
            f"frost line at {self['final_depth']} of {self['blocks']} blocks after {self['steps']} steps: {moves}",
            f"{self['decisions']} decisions, {self['seconds']['statistics']:.2f} s statistics, "
            f"{self['seconds']['decide']:.2f} s deciding",
            *(_memory_lines(self["memory"]) if self.get("memory") else []),
            *([_cache_line(self["cache"])] if self.get("cache") else []),
            *(f"limit: {message}" for message in self["limits"]),
        ]
        return "\n".join(lines)


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    lines = []
    if memory.get("plan"):
        lines.append(f"memory: {MemoryPlan.from_numbers(memory['plan'])}")
    if memory["kept"] is not None:
        kept = memory["kept"] / 2**20
        lines.append(f"memory: level {memory['level']}, at most {kept:.1f} MiB kept for a backward pass")
    return lines


def _cache_line(cache: dict[str, Any]) -> str:
    looked = cache["hits"] + cache["upgrades"] + cache["misses"]
    share = 100 * (cache["hits"] + cache["upgrades"]) / max(1, looked)
    size = cache["bytes"] / 2**20
    kept = f"{cache['records']} records, {size:.1f} MiB"
    trouble = "".join(f"; {cache[name]} {name}" for name in ("full", "torn", "lost", "stale") if cache[name])
    return f"cache: {share:.0f} % of {looked} samples below the frost line were read; {kept}{trouble}"
