"""``technique.compile``: the denoiser as one program, by torch.compile or torch.jit.trace, once for each shape."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError, close_match, on_gpu
from stages.techniques.base import Technique

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.memory.planner import ModelProfile

KEY = "technique.compile"
WAYS = ("none", "compile", "trace")
# Bytes of RES on a CPU, 763 MB measured (a stage's tree in report.html): torch's compiler, 200 MB that stay, and a C++
# compiler while it works.
COMPILER = 800_000_000
COMPILERS = ("g++", "c++", "clang++")


class Compile(Technique):
    """A program holds its weights, so they have to stay: ``technique.offload=none``."""

    name = "compile"
    keys = (KEY,)
    lanes = False  # a program knows the threads that it was made with

    @classmethod
    def of(cls, config: DictConfig) -> Compile | None:
        return None if config.technique.compile == "none" else cls(config)

    def __init__(self, config: DictConfig) -> None:
        self.way = config.technique.compile
        self._gpu = on_gpu(config)

    @classmethod
    def check(cls, config: DictConfig) -> None:
        way = config.technique.compile
        if way not in WAYS:
            raise ConfigError(KEY, way, f"one of {', '.join(WAYS)}", close_match(way, WAYS))
        if way != "none" and config.technique.offload != "none":
            hint = "Weights that come and go are in no program: technique.offload=none"
            raise ConfigError(KEY, way, f"none with technique.offload={config.technique.offload}", hint)
        if way == "compile" and on_gpu(config) and find_spec("triton") is None:
            raise ConfigError(KEY, way, "none or trace without triton", "pip install triton")
        compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        if way == "compile" and not on_gpu(config) and (compiler is None or shutil.which(compiler) is None):
            hint = "torch.compile writes C++ for a processor: install g++, or set CXX."
            raise ConfigError(KEY, way, "none or trace without a C++ compiler", hint)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        same = self.way == "trace" and not self._gpu  # a recorded pass runs the same kernels on a processor
        return {} if same else {KEY: self.way}

    def touches(self, stage: str) -> bool:
        return stage in ("lowres", "denoise")

    def planned(self, model: ModelProfile) -> ModelProfile:
        """On a processor with what compiles there."""
        more = COMPILER if self.way == "compile" and not self._gpu else 0
        return replace(model, weights=model.weights + more)

    def on_open(self, streamer: Any) -> None:
        if self.way == "trace":
            streamer.graphed = traced()
            return
        from torch._inductor import config as inductor

        from stages.memory.copies import as_written

        if not self._gpu:
            inductor.compile_threads = 1  # else a pool of processes, each with torch in it
        compiled: nn.Module = streamer.model
        as_written(compiled)
        compiled.compile(dynamic=False)


def traced() -> Callable[..., Tensor]:
    """A ``Streamer.graphed`` that records a pass at the first use of its shapes and runs the record from then on."""
    import torch

    known: dict[Hashable, Any] = {}

    def graphed(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        key = tuple((value.shape, value.dtype, value.stride()) for value in inputs)
        if key not in known:
            with warnings.catch_warnings():  # of sizes that become constants: each shape has a record of its own
                warnings.simplefilter("ignore")
                known[key] = torch.jit.trace(call, inputs, check_trace=False)
        return known[key](*inputs)

    return graphed
