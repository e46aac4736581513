"""Schedulers are diffusers' own, made from the checkpoint's scheduler config as ``from_config`` does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from stages.memory.imports import light_imports
from stages.models.checkpoint import Checkpoint


def make_scheduler(checkpoint: Checkpoint, class_name: str | None, options: Mapping[str, Any]) -> Any:
    """A fresh scheduler of class ``class_name`` (None: the checkpoint's), with ``options`` over its config.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """
    default, config = checkpoint.scheduler_config()
    name = class_name or default
    if {**config, **options}.get("use_beta_sigmas"):
        _import_scipy()
    with light_imports():
        import diffusers

        scheduler_class = _lms() if name == "LMSDiscreteScheduler" else getattr(diffusers, name, None)
        if scheduler_class is None:
            raise ValueError(f"scheduler.class_name: got {name!r}, expected a scheduler class of diffusers.")
        # PNDM's flag is in most published scheduler configs and means nothing to the others
        return scheduler_class.from_config(config, **options)


def _import_scipy() -> None:
    """Beta sigmas need scipy's statistics; ``light_imports`` leaves alone what is imported, and diffusers is told."""
    import scipy.stats  # noqa: F401

    with light_imports():
        setattr(importlib.import_module("diffusers.utils.import_utils"), "_scipy_available", True)  # noqa: B010


def _lms() -> Any:
    """``LMSDiscreteScheduler``, which integrates with scipy: 65 MB of RES for one integral of a polynomial."""
    module: Any = importlib.import_module("diffusers.schedulers.scheduling_lms_discrete")
    if not hasattr(module, "integrate"):
        module.integrate = SimpleNamespace(quad=quad)
    return module.LMSDiscreteScheduler


def quad(function: Callable[[float], float], start: float, end: float, **_: Any) -> tuple[float, float]:
    """(integral, error) as ``scipy.integrate.quad`` gives them, for polynomials up to degree 15 (Gauss-Legendre)."""
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(8)
    start, end = float(start), float(end)
    half, middle = (end - start) / 2, (end + start) / 2
    values = [float(function(middle + half * float(node))) for node in nodes]
    return half * sum(float(weight) * value for weight, value in zip(weights, values, strict=True)), 0.0
