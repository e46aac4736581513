"""Shared pieces of the workflow tests: a toy checkpoint, a toy pipeline, and commands in real processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from stages.config import ROOT, resolve
from stages.documents import escape_all
from stages.schema import Config

# as stage processes have it: with other work on the machine, threads that spin make small layers 50 times slower
assert "torch" not in sys.modules, "torch's threads would not see the next line"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

HELPERS = ROOT / "tests" / "helpers"
sys.path.insert(0, str(HELPERS))

from command import Command  # noqa: E402 - helpers, found through the line above
from in_process import Work  # noqa: E402

pytest_plugins = ["fast"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkpoint to everything that does not open it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for component in ("text_encoder", "unet", "vae", "scheduler"):
        (folder / component).mkdir()
        (folder / component / "config.json").write_text(f'{{"of": "{component}"}}')
    return folder


@pytest.fixture
def make_config(checkpoint: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """A resolved config without Hydra: ``make_config({"seed": 1, "denoise.strength": 0.3})``."""

    def make(values: dict | None = None, *, derive: bool = True) -> DictConfig:
        model = {"name": "toy", "family": "sd", "path": str(checkpoint), "native_size": 256, "size_multiple": 32}
        model |= {"phase_growth": 1.0}  # no upscaling phases, unless a test asks for them
        scheduler = {"name": "ddim", "class_name": "DDIMScheduler"}
        base = {"prompt": "a cat", "output_dir": str(tmp_path / "outputs"), "model": model, "scheduler": scheduler}
        config = OmegaConf.merge(OmegaConf.structured(Config), base)
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, escape_all(value))
        assert isinstance(config, DictConfig)
        return resolve(config) if derive else config

    return make


@pytest.fixture
def toy(tmp_path: Path, checkpoint: Path) -> Command:
    """The whole command line over the toy pipeline."""
    (tmp_path / "outputs").mkdir()
    return Command(HELPERS / "toy_runner.py", tmp_path / "outputs", checkpoint)


@pytest.fixture
def cli(tmp_path: Path, checkpoint: Path) -> Command:
    """The real command line."""
    (tmp_path / "outputs").mkdir()
    return Command(ROOT / "runner.py", tmp_path / "outputs", checkpoint)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random checkpoints, written once: ``small("sd15")`` is a diffusers folder of float32 weights.

    ``<folder>/<kind>.safetensors`` holds the same weights in the original layout.
    """
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        from benchmarks import random_checkpoint

        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            random_checkpoint.main([kind, str(made[kind]), "--layout", "both", "--small", "--dtype", "fp32"])
        return made[kind]

    return make


@pytest.fixture
def work(small: Callable[[str], Path], tmp_path: Path) -> Work:
    """Stages in this process over the tiny sd15 checkpoint, on an output folder of its own."""
    return Work(tmp_path / "outputs", small("sd15"))
