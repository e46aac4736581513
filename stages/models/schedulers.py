"""Schedulers are diffusers' own, made from the checkpoint's scheduler config as ``from_config`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.memory.imports import light_imports
from stages.models.checkpoint import Checkpoint


def make_scheduler(checkpoint: Checkpoint, class_name: str | None, options: Mapping[str, Any]) -> Any:
    """A fresh scheduler of class ``class_name`` (None: the checkpoint's), with ``options`` over its config."""
    with light_imports():
        import diffusers

        default, config = checkpoint.scheduler_config()
        # PNDM's flag is in most published scheduler configs and means nothing to the others
        scheduler = getattr(diffusers, class_name or default).from_config(config, **options)
    return scheduler
