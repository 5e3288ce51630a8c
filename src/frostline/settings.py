"""What a user may say of a part of Frostline: one word, a mapping, or the options themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ByteSize, ValidationError
from pydantic_core import PydanticCustomError

from frostline.errors import ConfigError, choices_message, validation_message

__all__ = ["KEYWORDS", "Bytes", "one_of", "options_from", "options_in"]

KEYWORDS = ("cache", "memory", "blocks", "events", "max_depth_changes")
"""What every host (``attach``, a callback, a loop) may be told besides a policy's own options."""

Options = TypeVar("Options", bound=BaseModel)


def one_of(kind: str, value: Any, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``; YAML reads the word off as false.

    Raises:
        ValueError: it is none, with the close matches.
    """
    word = "off" if value is False else value
    if not isinstance(word, str) or word not in choices:
        raise ValueError(choices_message(kind, str(word), choices))
    return str(word)


def _is_a_size(value: Any) -> str:
    """A number of bytes, or one with a unit; what else pydantic would read (``50%`` as 50) is refused."""
    text = value if isinstance(value, str) else ""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and 0 <= value < 2**63:
        text = str(round(value))
    if not re.fullmatch(r"\s*(\d{1,19}(\.\d+)?|\.\d+)\s*(|b|[kmgtp](i?b)?)\s*", text, re.IGNORECASE | re.ASCII):
        raise PydanticCustomError("size", "must be bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return text


# What a user says of an amount of memory: bytes, or "6GiB".
Bytes = Annotated[ByteSize, BeforeValidator(_is_a_size)]


def options_in(setting: Any, options: type[BaseModel], short: str, words: Iterable[str]) -> Any:
    """What ``options`` are made from: one word is the value of ``short``; null, or off as YAML reads it, says nothing.

    Raises:
        ValueError: it is neither a word nor options.
    """
    if setting is None or setting is False:
        return {}
    if isinstance(setting, str):
        return {short: setting}
    if isinstance(setting, Mapping):
        return dict(setting)
    if not isinstance(setting, options):
        raise ValueError(
            f"must be a {short} ({', '.join(words)}) or a mapping of options ({', '.join(options.model_fields)}), "
            f"not {setting!r}"
        )
    return setting


def options_from(setting: str | Mapping[str, Any] | Options | None, options: type[Options], kind: str) -> Options:
    """Options of ``kind`` from one word, from a mapping, or given back as they are.

    Raises:
        ConfigError: an unknown word or option, or a value that it cannot have.
    """
    try:
        return options.model_validate(setting)
    except ValidationError as error:
        raise ConfigError(validation_message(error, kind, options.model_fields)) from None
