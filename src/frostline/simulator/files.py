"""Reading the simulator's input files (YAML or JSON); every fault is one line that names the value and the rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from frostline.errors import ConfigError, choices_message
from frostline.simulator.cluster import Cluster, Input, Profile
from frostline.simulator.trajectory import Trajectory

__all__ = ["load", "read_cluster", "read_profile", "read_trajectory", "validated"]

Kind = TypeVar("Kind", bound=Input)

# A fault in every block of a profile is one fault to its author.
_SHOWN = 3


def read_profile(path: Path) -> Profile:
    """A profile's file, what ``frostline inspect MODEL --json`` printed, or what ``frostline plan --json`` wrote.

    An inspection may be given the keys ``optimizer_state``, ``sample_bytes`` and ``step_seconds`` besides its own.
    """
    content = _mapping(load(path, "profile"), path, "profile")
    if "predictions" in content:
        content = _mapping(content.get("profile"), path, "profile")
    if {"parts", "batch"} <= content.keys():
        content = _from_inspection(content, path)
    return validated(Profile, content, f"profile {str(path)!r}")


def read_cluster(path: Path) -> Cluster:
    """A cluster's file."""
    return validated(Cluster, _mapping(load(path, "cluster"), path, "cluster"), f"cluster {str(path)!r}")


def read_trajectory(path: Path) -> Trajectory:
    """A trajectory's file, a bare list of moves, or a run's ``summary.json``."""
    content = load(path, "trajectory")
    if isinstance(content, list):
        content = {"moves": content}
    elif isinstance(content, dict) and "trajectory" in content:
        content = {"moves": content["trajectory"]}
    return validated(Trajectory, _mapping(content, path, "trajectory"), f"trajectory {str(path)!r}")


def load(path: Path, kind: str) -> Any:
    """The values in a YAML or JSON file (which YAML reads too).

    Raises:
        ConfigError: no such file, or it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{kind} {str(path)!r} is no YAML or JSON: {' '.join(str(error).split())}") from None


def validated(model: type[Kind], content: Any, origin: str) -> Kind:
    """``content`` as a ``model``.

    Raises:
        ConfigError: it is none; the first faults in one line that begins with ``origin``.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # A misspelt key is missing too: what was written says more than what was not.
        found = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        faults = [_fault(fault, model) for fault in found]
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise ConfigError(f"{origin}: {'; '.join(faults[:_SHOWN])}{more}")


def _mapping(content: Any, path: Path, kind: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{kind} {str(path)!r} must be a mapping of keys to values, not {type(content).__name__}")
    return content


def _fault(fault: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a user can act on it."""
    where = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        place, _, key = where.rpartition(".")
        return choices_message(f"key{f' of {place}' if place else ''}", key, _known(model, fault["loc"]))
    if fault["type"] == "missing":
        return f"{where}: missing; it is required"
    if not where:
        return message
    # A whole section or list would fill the line.
    shown = "" if isinstance(fault["input"], (Mapping, list)) else f"={fault['input']!r}"
    return f"{where}{shown}: {message}"


def _known(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that there are where the last part of ``location`` is none."""
    for part in location[:-1]:
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, a list of, or none of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _from_inspection(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """An inspection, which is of a whole batch, as a profile."""
    try:
        parts = [
            {
                "forward_seconds": part["forward_seconds"] / found["batch"],
                "backward_seconds": part["backward_seconds"] / found["batch"],
                "parameter_bytes": part["bytes"],
                "activation_bytes": part["saved_bytes"] // found["batch"],
            }
            for part in found["parts"]
        ]
    except (KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(
            f"profile {str(path)!r}: not what `frostline inspect MODEL --json` prints of a model that it could measure"
        ) from None
    own: dict[str, Any] = {
        key: found[key] for key in ("optimizer_state", "sample_bytes", "step_seconds") if key in found
    }
    return {"name": found.get("model", ""), "stem": parts[0], "blocks": parts[1:-1], "head": parts[-1], **own}
