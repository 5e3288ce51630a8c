"""What a step takes of memory, and SlimFit's compression of the tensors that autograd saves for the backward pass."""

from frostline.memory.compressor import Compressor, compressing, refuse_compiled
from frostline.memory.footprint import Footprint, footprint
from frostline.memory.levels import LEVELS, Level, level_named
from frostline.memory.model import Bench, MemoryModel, OptimizerCost, Way, optimizer_cost
from frostline.memory.options import NO_BUDGET, MemoryOptions, MemorySetting, memory_options
from frostline.memory.peak import LiveBytes
from frostline.memory.planner import MemoryPlan, candidates, plan_memory
from frostline.memory.truth import gradient_cosines

__all__ = [
    "LEVELS",
    "NO_BUDGET",
    "Bench",
    "Compressor",
    "Footprint",
    "Level",
    "LiveBytes",
    "MemoryModel",
    "MemoryOptions",
    "MemoryPlan",
    "MemorySetting",
    "OptimizerCost",
    "Way",
    "candidates",
    "compressing",
    "footprint",
    "gradient_cosines",
    "level_named",
    "memory_options",
    "optimizer_cost",
    "plan_memory",
    "refuse_compiled",
]
