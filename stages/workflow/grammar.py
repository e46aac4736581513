"""Hydra's override grammar: an argument taken apart, texts and values as it has them, command lines put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from stages.config import ConfigError
from stages.documents import escape

_OVERRIDE = re.compile(r"(?P<sign>~|\+{0,2})(?P<key>[^=]*?)(?P<package>@[^=]*)?(?P<equal>=)(?P<value>.*)", re.DOTALL)
ALTERNATIVES = {"prompt", "prompt_file", "prompt_line"}


class Override(NamedTuple):
    """``sign key package = value`` of one argument; the value is as typed."""

    sign: str
    key: str
    package: str
    value: str


def parse(argument: str) -> Override | None:
    """Take an argument apart; None if it is not ``key=value`` (or ``~key``)."""
    match = _OVERRIDE.fullmatch(argument)
    if match:
        return Override(match["sign"], match["key"].strip(), match["package"] or "", match["value"])
    return Override("~", argument[1:], "", "") if re.fullmatch(r"~[\w./]+", argument) else None


def quote(text: str) -> str:
    """A text as a quoted value of Hydra's override grammar that OmegaConf will not interpolate.

    Backslashes count only before a quote or at the end, where the grammar wants them doubled.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("prompt", text, "text in UTF-8", "Set a UTF-8 locale, or use prompt_file=FILE.")
    escaped = re.sub(r"(\\*)(')", lambda match: match[1] * 2 + "\\'", escape(text))
    return "'" + re.sub(r"\\+$", lambda match: match[0] * 2, escaped) + "'"


def readable(text: str, said: Override) -> str:
    """``text``, if Hydra's grammar takes it: its own words for what it does not take name no key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        hint = f"A text with signs in it is quoted twice: {said.key}=\"'...'\""
        raise ConfigError(said.key, said.value[:200], "a value in Hydra's grammar", hint) from None
    return text


def merge(base: Iterable[str], new: Iterable[str]) -> list[str]:
    """Overrides of two command lines; of equal keys (or ``prompt`` and ``prompt_file``) the new one stays."""
    found: dict[str, str] = {}
    new = list(new)
    fresh = {override.key for text in new if (override := parse(text))}
    for text in [*base, *new]:
        override = parse(text)
        assert override is not None, text
        other = ALTERNATIVES & fresh if override.key in ALTERNATIVES else set()
        replaced = text not in new and (override.key in fresh or other)
        if not replaced:
            found[f"{override.key}{override.package}"] = text
    return list(found.values())


def value_of(overrides: Iterable[str], key: str) -> str | None:
    """The plain text that an override gives to ``key``; None if none does."""
    values = [override.value for text in overrides if (override := parse(text)) and override.key == key]
    if not values or values[-1] in ("", "null"):
        return None
    text = values[-1]
    return text[1:-1].replace("\\'", "'") if text[0] in "'\"" and text[-1] == text[0] else text


def without(overrides: Iterable[str], *keys: str) -> list[str]:
    return [text for text in overrides if (override := parse(text)) and override.key not in keys]


def written(key: str, value: Any) -> str:
    """A plain value as an override."""
    return f"{'++' if key.startswith('scheduler.options.') else ''}{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_literal(below)}" for name, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
