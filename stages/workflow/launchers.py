"""Launchers of sweeps that are extras: joblib, Slurm, Ray."""

from __future__ import annotations

import importlib.util

from stages.config import ConfigError
from stages.workflow.grammar import value_of

LAUNCHER = "hydra/launcher"
_LAUNCHERS = {  # name: our extra, the package that it brings, our class in the place of its own
    "joblib": ("joblib", "hydra_plugins.hydra_joblib_launcher", ""),
    "submitit_slurm": ("slurm", "hydra_plugins.hydra_submitit_launcher", "cluster.Slurm"),
    "submitit_local": ("slurm", "hydra_plugins.hydra_submitit_launcher", "cluster.Local"),
    "ray": ("ray", "ray", ""),
}


def launcher(overrides: list[str]) -> list[str]:
    """Launchers that are extras: ours in the place of Hydra's own, and how those are installed that are not there."""
    name = value_of(overrides, LAUNCHER)
    if name not in _LAUNCHERS:
        return overrides
    extra, package, target = _LAUNCHERS[name]
    if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
        hint = f"Install it: pip install -c constraints.txt -e '.[{extra}]'"
        raise ConfigError(LAUNCHER, name, f"a launcher that is installed ({package} is not)", hint)
    return [*overrides, f"hydra.launcher._target_=hydra_plugins.highres_lowram.{target}"] if target else overrides
