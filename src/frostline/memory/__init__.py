"""SlimFit's second half: the tensors that autograd saves for the backward pass are compressed."""

from frostline.memory.compressor import Compressor, compressing
from frostline.memory.footprint import Footprint, footprint
from frostline.memory.levels import LEVELS, Level, level_named
from frostline.memory.options import MemoryOptions, MemorySetting, memory_options
from frostline.memory.peak import LiveBytes
from frostline.memory.truth import gradient_cosines

__all__ = [
    "LEVELS",
    "Compressor",
    "Footprint",
    "Level",
    "LiveBytes",
    "MemoryOptions",
    "MemorySetting",
    "compressing",
    "footprint",
    "gradient_cosines",
    "level_named",
    "memory_options",
]
