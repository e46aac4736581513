"""Techniques: switches of the ``technique`` config node, each in a file of its own. No torch before one is applied."""

from __future__ import annotations

from omegaconf import DictConfig

from stages.techniques.attention import Attention
from stages.techniques.base import Technique
from stages.techniques.channels_last import ChannelsLast
from stages.techniques.compile import Compile
from stages.techniques.controlnet import ControlNets, LowresControlNets
from stages.techniques.inversion import TextualInversion
from stages.techniques.linfusion import LinFusion
from stages.techniques.lora import Lora, TextLora
from stages.techniques.offload import Offload
from stages.techniques.processor import Processor
from stages.techniques.quantize import Quantize
from stages.techniques.step_cache import StepCache
from stages.techniques.tf32 import Tf32
from stages.techniques.tome import ToMe
from stages.techniques.vae import VaeTiling

TECHNIQUES: tuple[type[Technique], ...] = (
    ChannelsLast,
    Tf32,
    LinFusion,
    ControlNets,
    LowresControlNets,
    Lora,
    TextLora,
    TextualInversion,
    Attention,
    StepCache,
    ToMe,
    VaeTiling,
    Offload,
    Compile,
    Quantize,  # of the weights that the others give, and of the layers that they leave
    Processor,  # the last: of what is left as floats
)


def techniques_of(config: DictConfig, stage: str) -> tuple[Technique, ...]:
    """Those that are on and touch ``stage`` (the module's name), in the order in which they are applied."""
    made = (kind.of(config) for kind in TECHNIQUES)
    return tuple(one for one in made if one is not None and one.touches(stage))
