"""A file of regions as plain values: JSON read as JSON, YAML with texts as they are written; bounded in size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from stages.config import ConfigError

MOST_BYTES = 4_000_000
MOST_VALUES = 100_000  # a YAML alias counts where it is used: ten lines of them can stand for 10^10 values
MOST_DEPTH = 20
_TEXTS = ("prompt", "negative_prompt", "grid")
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """Dates are text, and so is whatever stands where a prompt does: ``prompt: 1984``, ``prompt: no``."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if key.value in _TEXTS:
                _as_text(value)
        return super().construct_mapping(node, deep)


def _as_text(node: yaml.Node, depth: int = 0) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
        node.tag = _TEXT
    elif isinstance(node, yaml.SequenceNode) and depth < 2:  # rows of prompts
        for one in node.value:
            _as_text(one, depth + 1)


def read_document(path: Path) -> Any:
    """What the file at ``path`` says.

    Raises:
        ConfigError: it cannot be read, is neither JSON nor YAML, or is too large or too deep.
    """
    if not path.is_file():
        raise ConfigError("regions", str(path), "a YAML or JSON file of regions (no such file)")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError("regions", str(path), f"a file of at most {MOST_BYTES} bytes")
    try:
        found = _parsed(path.read_text(encoding="utf-8-sig"), path.suffix.lower() == ".json")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError("regions", str(path), f"a YAML or JSON file of regions ({error})") from None
    _bounded(path, found)
    return found


def _parsed(text: str, is_json: bool) -> Any:
    if is_json or text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            if is_json:
                raise
    return yaml.load(text, _Loader)


def _bounded(path: Path, found: Any) -> None:
    todo, count = [(found, 0)], 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > MOST_VALUES or depth > MOST_DEPTH:
            expected = f"at most {MOST_VALUES} values (aliases count where they are used), {MOST_DEPTH} levels deep"
            raise ConfigError("regions", str(path), expected)
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ConfigError("regions", value, "text that UTF-8 can write (half of a character's code)") from None
        below = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(one, depth + 1) for one in below]
