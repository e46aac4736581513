"""What a processor's kernels do in less time and memory, to the same bits: no switch, but for where it cannot act."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stages.config import dtype_of_component, on_gpu
from stages.families.facts import facts_of
from stages.techniques.base import SAMPLING, Technique, denoises

if TYPE_CHECKING:
    from torch import nn


class Processor(Technique):
    """A denoiser in float32: convolutions that lie channels-last take weights as they compute with them
    (:mod:`stages.blocked`), gated layers some rows at a time. No graph of torch's compilers holds either."""

    name = "processor"
    decides = False

    @classmethod
    def of(cls, config: DictConfig) -> Processor | None:
        if on_gpu(config) or config.technique.compile != "none":
            return None
        single = dtype_of_component(config, facts_of(config).denoiser) == "fp32"
        return cls(convolutions=config.technique.channels_last) if single else None

    def __init__(self, *, convolutions: bool) -> None:
        self.convolutions = convolutions

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def on_model(self, network: nn.Module, component: str) -> None:
        from torch import nn

        from stages.blocked import lay_out
        from stages.memory.copies import gated_in_rows

        if not denoises(component):
            return
        gated_in_rows(network)
        for module in network.modules() if self.convolutions else ():
            if type(module) is nn.Conv2d:
                lay_out(module)
