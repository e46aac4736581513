"""What a finished run is worth, for a sweeper that looks for the best one (``score=``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.config import ConfigError
from stages.files import read_object
from stages.workflow.store import Store


def scorer(wanted: str) -> Callable[[Path], float]:
    """The function that gives a number to a run's folder.

    Args:
        wanted: ``seconds`` (of its stages, when they were computed), ``peak`` (MB), ``seams`` (how visible the borders
            of its tiles are: 1 as anything else in the picture), or ``module:function``, called with the folder.

    Raises:
        ConfigError: none of these; and when it is called, a run that has no such figure.
    """
    if wanted in _FIGURES:
        return _FIGURES[wanted]
    module, _, function = wanted.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError("score", wanted, f"{', '.join(_FIGURES)}, or module:function ({error})") from None
    return lambda run_dir: float(call(run_dir))


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    found = read_object(run_dir / "run.json").get("stages")
    if not found:
        raise ConfigError("score", str(run_dir), "a run with a result")
    return found


def _peak(run_dir: Path) -> float:
    return max(one["peak_rss_bytes"] for one in _stages(run_dir)) / 1e6


def _seconds(run_dir: Path) -> float:
    store = Store(run_dir.parent / ".store")
    return sum(store.entry(one["name"], one["fingerprint"]).stats().get("seconds", 0) for one in _stages(run_dir))


def _seams(run_dir: Path) -> float:
    file = run_dir / "stitch" / "seams.json"
    if not file.is_file():  # not the same as a picture of one tile, which has no borders
        raise ConfigError("score", "seams", f"a run with a picture: {file} is not there")
    return max((one["local_ratio"] for one in read_object(file).values()), default=1.0)


_FIGURES = {"seams": _seams, "seconds": _seconds, "peak": _peak}
