"""Finding a policy by name: the shipped ones, registered ones and those of installed packages.

A third party adds a policy with ``register(MyPolicy)`` or, without any import by the user, with an entry
point in the group ``frostline.policies`` that names the class.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from pydantic import ValidationError

from frostline.errors import ConfigError, choices_message, validation_message
from frostline.policies.base import Plan, Policy, PolicyOptions
from frostline.policies.gradient_norm import GradientNorm
from frostline.policies.interlayer import Interlayer
from frostline.policies.none import NoFreezing
from frostline.policies.ramp import Ramp
from frostline.policies.random_blocks import RandomBlocks
from frostline.policies.static import Static

__all__ = ["ENTRY_POINT_GROUP", "available", "create", "register", "validate"]

ENTRY_POINT_GROUP = "frostline.policies"

logger = logging.getLogger("frostline")

_REGISTERED: dict[str, type[Policy[Any]]] = {
    policy.name: policy for policy in (NoFreezing, Static, Ramp, RandomBlocks, GradientNorm, Interlayer)
}


def register(policy: type[Policy[Any]]) -> type[Policy[Any]]:
    """Add a policy under its ``name``; usable as a decorator. A name that is taken is an error."""
    taken = _REGISTERED.get(policy.name)
    if taken is not None and taken is not policy:
        raise ConfigError(f"policy name {policy.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    _REGISTERED[policy.name] = policy
    return policy


def available() -> dict[str, type[Policy[Any]]]:
    """Every policy by name, those of installed packages included; one that cannot be loaded is left out with a word."""
    found = dict(_REGISTERED)
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in found:
            try:
                found[entry.name] = entry.load()
            except Exception as error:  # somebody else's package: it must not take the other policies with it
                logger.warning("policy %r (%s) cannot be loaded: %s", entry.name, entry.value, error)
    return found


def validate(name: str, options: Mapping[str, Any], beside: Iterable[str] = ()) -> PolicyOptions:
    """Check a policy's options; every fault is named in one :class:`ConfigError`.

    Args:
        beside: other keywords that whoever calls may be given in the same place; a misspelt option may mean them.
    """
    policies = available()
    if name not in policies:
        raise ConfigError(choices_message("policy", str(name), policies))
    cls = policies[name].Options
    try:
        return cls(**options)
    except ValidationError as error:
        faults = [validation_message(error, f"policy {name!r}", [*cls.model_fields, *beside])]
        for option in sorted(options.keys() - cls.model_fields.keys()):
            owners = [repr(other) for other, policy in policies.items() if option in policy.Options.model_fields]
            if owners:
                faults.append(f"{option!r} is an option of policy {' and '.join(owners)}")
        raise ConfigError("; ".join(faults)) from None


def create(name: str, options: Mapping[str, Any], plan: Plan) -> Policy[Any]:
    """Build a policy for a run; unknown names, bad options and ones left open are :class:`ConfigError`."""
    checked = validate(name, options)
    if checked.undecided is not None:
        raise ConfigError(
            f"policy {name!r}, {checked.undecided}='auto': that is for a memory budget to choose; set "
            f"{checked.undecided} itself, or memory.budget under a Trainer"
        )
    return available()[name](checked, plan)
