"""The keys and options that there are; others are refused, with the one that may be meant."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from stages.config import ROOT, ConfigError, close_match
from stages.schema import Config
from stages.workflow.grammar import Override
from stages.workflow.words import meant, nearest

CONF = ROOT / "conf"
_FREE = (
    "technique.component_dtype",
    "scheduler.options",
    "regions",
    "reroll",
    "hydra",
)  # anything may stand below these
_OPTIONAL = {"experiment"}  # groups of which no option need be taken
_RUN = re.compile(r"\w[\w.-]{0,99}")


def known_keys(node: Any = Config, prefix: str = "") -> set[str]:
    """Every dotted key of the schema."""
    found = set()
    for field in fields(node):
        key = f"{prefix}{field.name}"
        found.add(key)
        if is_dataclass(field.default_factory):
            found |= known_keys(field.default_factory, f"{key}.")
    return found


def groups() -> dict[str, list[str]]:
    """Config group -> its options."""
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}


def check(override: Override, multirun: bool, options: dict[str, list[str]]) -> None:
    """Refuse an unknown key or group option, with the close match.

    Raises:
        ConfigError
    """
    key = override.key
    if key.startswith("hydra") or any(key == free or key.startswith(f"{free}.") for free in _FREE):
        return
    if key in options and (override.sign != "~" or override.value):
        values = override.value.split(",") if multirun else [override.value]
        for value in values:
            plain = value.strip().strip("'\"")
            nothing = plain == "null" and key in _OPTIONAL
            several = plain[:1] in ("[", "{") and key not in _OPTIONAL
            swept = re.search(r"[\[\](){}*]", plain) is not None and not several
            if plain not in options[key] and not nothing and not swept:
                expected = f"one of {', '.join(options[key])}"
                near = nearest(plain) if key == "scheduler" else ""
                raise ConfigError(key, plain, expected, near or close_match(plain, options[key]))
    elif key not in options and key not in known_keys():
        near = meant(key) or close_match(key, known_keys()) or close_match(f"x.{key}".split(".")[-1], known_keys())
        raise ConfigError(key, f"{key}={override.value[:40]}", "a known key", near or "See python runner.py --help")


def check_run_name(name: str) -> None:
    """Refuse a run name that is not one plain folder name.

    Raises:
        ConfigError
    """
    if not _RUN.fullmatch(name):
        raise ConfigError("run", name, "a folder name of letters, digits, _ - and ., starting with a letter or digit")


def check_output_dir(folder: Path) -> None:
    """Make the folder of all runs; refuse one that cannot be made or written to.

    Raises:
        ConfigError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output_dir", str(folder), f"a folder that can be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError("output_dir", str(folder), "a folder that can be written to")
