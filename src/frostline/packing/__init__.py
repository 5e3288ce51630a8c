"""Packing: spending the memory that freezing frees on larger batches, or on fewer ranks."""

from frostline.packing.account import Entry, account, cost_of, note
from frostline.packing.carry import carry
from frostline.packing.options import MODES, PackOptions
from frostline.packing.order import Order
from frostline.packing.rules import Pace, next_stage
from frostline.packing.stages import STAGES, Job, Look, Stage, Stages

__all__ = [
    "MODES",
    "STAGES",
    "Entry",
    "Job",
    "Look",
    "Order",
    "Pace",
    "PackOptions",
    "Stage",
    "Stages",
    "account",
    "carry",
    "cost_of",
    "next_stage",
    "note",
]
