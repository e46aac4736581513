"""What a run keeps of its command lines: the base of its next one, also where the file that holds it is damaged."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stages.config import ConfigError
from stages.documents import load
from stages.files import read_json

SAVED = "overrides.json"  # of a run: what its command line said, ready for Hydra


def settings(run_dir: Path, options: Mapping[str, list[str]]) -> list[str] | dict[str, Any]:
    """The run's overrides as they were saved ([] for a new run), else the values of its ``config.yaml``, flat.

    Raises:
        ConfigError: neither can be read.
    """
    listed = read_json(run_dir / SAVED)
    if isinstance(listed, list) and all(isinstance(text, str) and text for text in listed):
        return listed
    if not (run_dir / SAVED).exists() and not (run_dir / "config.yaml").exists():
        return []
    try:
        plain = OmegaConf.to_container(load(run_dir / "config.yaml"), resolve=True)
    except Exception as error:
        hint = "Give another run=NAME, or remove that folder: results in .store are found again."
        raise ConfigError("run", str(run_dir), f"a run whose {SAVED} or config.yaml can be read", hint) from error
    print(f"{run_dir / SAVED} cannot be read: its values are those of config.yaml", file=sys.stderr, flush=True)
    assert isinstance(plain, dict)
    scheduler = plain["scheduler"]
    chosen = {"scheduler": scheduler["name"]} if scheduler.get("name") in options.get("scheduler", ()) else {}
    return {**chosen, **dict(_flat(plain))}


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in ("regions", "technique.component_dtype"):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in ({}, []):
            yield f"{prefix}{key}", value
