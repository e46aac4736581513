"""Families of models: what is particular to Stable Diffusion, and to every other. ``facts`` needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stages.families.facts import facts_of

if TYPE_CHECKING:
    from stages.families.base import Family


def family_of(config: DictConfig) -> Family:
    """The family of a config's model, with all that it imports."""
    facts = facts_of(config)
    return importlib.import_module(f"stages.families.{facts.module}").FAMILY
