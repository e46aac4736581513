"""The machine and the libraries that the look at the models measures: their speed and size are in its result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stages.config import cpu_field, on_gpu
from stages.distributed import processors

LIBRARIES = ("torch", "diffusers", "transformers")
# what decides which kernels run
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
GPU_THREADS = 8  # of a process on a GPU, at most
_GPUS = Path("/proc/driver/nvidia/gpus")


def machine(config: DictConfig) -> dict[str, Any]:
    """Processor, threads, GPUs (where the run computes on one) and versions of libraries, as plain values."""
    flags = set(cpu_field("flags", "features").split())
    found: dict[str, Any] = {
        "cpu": cpu_field("model name", "cpu part") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "threads": threads(config),
        "libraries": {name: _version(name) for name in LIBRARIES},
        # as ``memory.imports`` reads it, which the runner does not import: what libraries take hangs on it
        "light_imports": os.environ.get("HIGHRES_LIGHT_IMPORTS", "1") != "0",
    }
    if on_gpu(config):
        found["gpu"] = gpus()
    return found


def threads(config: DictConfig) -> int:
    """Of a stage's process: ``launch.threads``, what the environment says, or one for each processor. On a GPU what is
    left to the processor are rows of the canvas: a thread for each of many cores, of several ranks, costs more than the
    work."""
    asked = config.launch.threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    if asked or not on_gpu(config):
        return asked or processors()
    return max(1, min(GPU_THREADS, processors() // (config.launch.get("nproc") or 1)))


def gpus() -> list[str]:
    """Names of this machine's GPUs, as their driver gives them; [] where it does not."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(_GPUS.glob("*/information"))]
    fields = [line.partition(":") for text in texts for line in text.splitlines()]
    return [value.strip() for name, _, value in fields if name == "Model"]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
