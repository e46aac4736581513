"""What a processor's kernels do in less time and memory, to the same bits: no switch, but for where it cannot act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stages.config import dtype_of_component, on_gpu
from stages.families.facts import facts_of
from stages.techniques.base import SAMPLING, Technique, denoises
from stages.techniques.dtype import TORCH

if TYPE_CHECKING:
    from torch import nn


class Processor(Technique):
    """A denoiser in float32 or bf16: convolutions that lie channels-last take weights as they compute with them
    (:mod:`stages.blocked`); feed-forwards take some rows at a time, in float32 those that are gated. No
    graph of torch's compilers holds any of it."""

    name = "processor"
    decides = False

    @classmethod
    def of(cls, config: DictConfig) -> Processor | None:
        if on_gpu(config) or config.technique.compile != "none":
            return None
        name = dtype_of_component(config, facts_of(config).denoiser)
        return cls(name, convolutions=config.technique.channels_last) if name in ("fp32", "bf16") else None

    def __init__(self, dtype: str = "fp32", *, convolutions: bool) -> None:
        self.dtype, self.convolutions = dtype, convolutions

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def on_model(self, network: nn.Module, component: str) -> None:
        import torch
        from torch import nn

        from stages.blocked import lay_out
        from stages.memory.copies import feed_forwards_in_rows, gated_in_rows

        if not denoises(component):
            return
        if self.dtype == "fp32":
            gated_in_rows(network)
        else:
            feed_forwards_in_rows(network)
        dtype = getattr(torch, TORCH[self.dtype])
        for module in network.modules() if self.convolutions else ():
            if type(module) is nn.Conv2d:
                lay_out(module, dtype)
