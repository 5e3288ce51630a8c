"""Policies: numbers in, decision out. One file per policy; ``registry`` finds them by name."""

from frostline.policies.base import Cadence, Decision, Explained, Observation, Plan, Policy, PolicyOptions
from frostline.policies.registry import available, create, register, validate

__all__ = [
    "Cadence",
    "Decision",
    "Explained",
    "Observation",
    "Plan",
    "Policy",
    "PolicyOptions",
    "available",
    "create",
    "register",
    "validate",
]
