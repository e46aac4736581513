"""``technique.tf32``: float32 products of a GPU in TensorFloat-32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError, on_gpu, resolve_dtype
from stages.families.facts import facts_of
from stages.techniques.base import Technique
from stages.techniques.dtype import dtype_name

if TYPE_CHECKING:
    from torch import nn


class Tf32(Technique):
    """Ten bits of mantissa instead of 23, several times as fast; it acts in float32 only.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """

    name = "tf32"
    keys = ("technique.tf32",)

    @classmethod
    def of(cls, config: DictConfig) -> Tf32:
        return cls(bool(config.technique.tf32))

    @classmethod
    def check(cls, config: DictConfig) -> None:
        components = [name for name in facts_of(config).opened if name != "scheduler"]
        if config.technique.tf32 and not on_gpu(config):
            raise ConfigError("technique.tf32", True, "false on a CPU", "TensorFloat-32 is of NVIDIA's GPUs.")
        if config.technique.tf32 and not any(dtype_name(config, name) == "fp32" for name in components):
            hint = "It acts on float32 products: technique.dtype=fp32"
            raise ConfigError("technique.tf32", True, f"false where all computes in {resolve_dtype(config)}", hint)

    def __init__(self, on: bool = True) -> None:
        self.on = on

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {"technique.tf32": self.on}

    def on_model(self, network: nn.Module, component: str) -> None:
        import torch

        # torch allows it for convolutions unless told otherwise: off has to be said as well
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.on
