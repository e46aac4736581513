"""``stage=export run=NAME to=DIR``: one run's folder alone, with what its links lead to."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.paths import anchored
from stages.workflow.upkeep.survey import size

_work = shutil.ignore_patterns(".lock", ".tmp-*", "checkpoint*")


def export(config: DictConfig) -> None:
    """Copy a run to a new folder, which can be looked at without anything else: report, picture, results of its stages.

    Raises:
        ConfigError: no such run, or the folder is there already.
    """
    if config.run is None:
        raise ConfigError("run", None, "the name of a run", "python runner.py stage=export run=NAME to=DIR")
    if config.to is None:
        raise ConfigError("to", None, "a new folder", "python runner.py stage=export run=NAME to=DIR")
    source, target = anchored(config.output_dir) / config.run, Path(config.to).expanduser().absolute()
    if not (source / "config.yaml").is_file():
        raise ConfigError("run", config.run, f"a run in {source.parent}", "python runner.py stage=list shows them.")
    if target.exists():
        raise ConfigError("to", str(target), "a folder that is not there yet")
    beside = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside, ignore=_left)
    beside.rename(target)
    total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target} ({size(total)})", flush=True)


def _left(folder: str, names: list[str]) -> set[str]:
    """What is not copied: unfinished work, and links to results that are gone."""
    return _work(folder, names) | {name for name in names if not (Path(folder) / name).exists()}
