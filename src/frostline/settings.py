"""What a user may say of a part of Frostline: one word, a mapping, or the options themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from frostline.errors import ConfigError, choices_message, validation_message

__all__ = ["one_of", "options_from"]

Options = TypeVar("Options", bound=BaseModel)


def one_of(kind: str, value: Any, choices: Iterable[str]) -> str:
    """``value`` if it is one of ``choices``; YAML reads the word off as false.

    Raises:
        ValueError: it is none, with the close matches.
    """
    word = "off" if value is False else value
    if word not in choices:
        raise ValueError(choices_message(kind, str(word), choices))
    return str(word)


def options_from(setting: str | Mapping[str, Any] | Options, options: type[Options], short: str, kind: str) -> Options:
    """Options of ``kind`` from the value of ``short`` alone, from a mapping, or given back as they are.

    Raises:
        ConfigError: an unknown option, or a value that it cannot have.
    """
    if isinstance(setting, options):
        return setting
    given = {short: setting} if isinstance(setting, str) else dict(setting)
    try:
        return options(**given)
    except ValidationError as error:
        raise ConfigError(validation_message(error, kind, options.model_fields)) from None
