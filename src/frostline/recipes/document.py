"""YAML for recipes: floats and booleans as people write them, duplicate keys refused, dotted overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from frostline.errors import ConfigError

__all__ = ["apply_overrides", "parse_yaml", "read_yaml"]


_KEPT = ("blocks", "max_depth_changes")  # what belongs to `freeze` itself, not to a policy
_ONE_WORD = {"cache": "mode", "memory": "level", "pack": "mode"}  # what a section in one word says


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``5e-5`` is a number, ``off`` and ``no`` are words (PyYAML's 1.1 has both the other way)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"""^[-+]?(?:
            (?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
            |[0-9]+[eE][-+]?[0-9]+
            |\.(?:inf|Inf|INF|nan|NaN|NAN)
        )$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The value that ``text`` says; malformed YAML is a one-line :class:`ConfigError` that names ``origin``."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{origin}{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, not {type(content).__name__}")
    return content


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``content`` with each ``a.b=value`` set; values are YAML.

    Another ``freeze.policy`` than the file's drops the file's options of the old policy: the new one has its own.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    pairs = [_split(override) for override in overrides]
    freeze = result.get("freeze")
    for path, value in pairs:
        if path == ["freeze", "policy"] and isinstance(freeze, dict) and freeze.get("policy") != value:
            result["freeze"] = {key: freeze[key] for key in _KEPT if key in freeze}
    for path, value in pairs:
        section: dict[str, Any] = result
        for depth, key in enumerate(path[:-1], start=1):
            inner = section.get(key)
            if depth == 1 and key in _ONE_WORD and isinstance(inner, str):
                inner = {_ONE_WORD[key]: inner}
            if inner is not None and not isinstance(inner, dict):
                above = ".".join(path[:depth])
                raise ConfigError(f"override {'.'.join(path)}: {above} is the value {inner!r}, not a section")
            section[key] = section = dict(inner or {})
        section[path[-1]] = value
    return result


def _split(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r}: write key=value, for instance freeze.percentile=75 or seed=1")
    return path, parse_yaml(text, f"override {override!r}")
