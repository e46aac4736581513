"""What is done with the folder of runs, not with one of them: ``stage=list``, ``gc``, ``export``, ``serve``."""

from __future__ import annotations

import importlib

from omegaconf import DictConfig

COMMANDS = {  # stage= : module, imported only then, and function
    "list": ("stages.workflow.upkeep.listing", "listing"),
    "gc": ("stages.workflow.upkeep.clean", "gc"),
    "export": ("stages.workflow.upkeep.export", "export"),
    "serve": ("stages.workflow.report.serve", "serve"),
}


def command(config: DictConfig) -> bool:
    """Do it if ``stage=`` names one of these; whether it did.

    Raises:
        ConfigError: what it was told cannot be.
    """
    if not isinstance(config.stage, str) or config.stage not in COMMANDS:
        return False
    module, function = COMMANDS[config.stage]
    getattr(importlib.import_module(module), function)(config)
    return True
