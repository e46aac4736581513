"""Configurations as YAML documents, texts exactly as typed: nothing in them is taken for an interpolation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.schema import Config

OmegaConf.register_new_resolver("three_question_marks", lambda: "???", replace=True)


def escape(text: str) -> str:
    """Text as OmegaConf has to hold it so that reading it gives ``text``: ``${`` must not interpolate.

    ``$`` before ``{`` gets a backslash; backslashes before that are doubled, as OmegaConf's grammar wants. The text
    ``???`` would mean "missing", so a resolver gives it back.
    """
    if text == "???":
        return "${three_question_marks:}"
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def escape_all(value: Any) -> Any:
    """``escape`` for every text in a plain value."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {key: escape_all(below) for key, below in value.items()}
    return [escape_all(below) for below in value] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Writes texts with line breaks or invisible characters in double quotes: other styles lose some of them."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent)


def save_text(config: DictConfig) -> str:
    """The ``config.yaml`` of a run: plain YAML, every value resolved, texts exactly as typed."""
    plain = OmegaConf.to_container(config, resolve=True)
    return yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**9)


def load(path: Path) -> DictConfig:
    """Read what ``save_text`` wrote, checked against the schema; ``${`` in it is text and stays text.

    Raises:
        ConfigError: no such file, or not a configuration of this program.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return OmegaConf.merge(OmegaConf.structured(Config), escape_all(plain))  # type: ignore[return-value]
    except FileNotFoundError:
        hint = "It is written by: python runner.py run=NAME stage=plan prompt=..."
        raise ConfigError("run", str(path), "a run folder with its config.yaml", hint) from None
