"""``technique.channels_last``: convolutions in the memory format that CPUs and tensor cores compute in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.techniques.base import Technique

if TYPE_CHECKING:
    from torch import Tensor

_CONVOLUTIONAL = ("lowres", "guide", "denoise", "decode", "profile")


class ChannelsLast(Technique):
    """4-D weights lie channels-last, and so do the samples of a denoiser."""

    name = "channels_last"
    keys = ("technique.channels_last",)
    channels_last = True

    @classmethod
    def of(cls, config: DictConfig) -> ChannelsLast | None:
        return cls() if config.technique.channels_last else None

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {"technique.channels_last": True}

    def touches(self, stage: str) -> bool:
        return stage in _CONVOLUTIONAL

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        import torch

        for name, value in inputs.items():
            if value.dim() == 4:
                inputs[name] = value.contiguous(memory_format=torch.channels_last)
