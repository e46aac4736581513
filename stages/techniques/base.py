"""The door of a technique: what it may change of a model, its weights and its calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.context import StageContext
    from stages.memory.layout import Layout
    from stages.memory.planner import ModelProfile
    from stages.memory.source import WeightSource
    from stages.tiles import Size

SAMPLING = ("lowres", "denoise", "profile")  # stages in which a denoiser runs, and the one that looks at it


def denoises(component: str) -> bool:
    """Whether it is the denoiser or steers it (a ControlNet): neither a VAE nor a text encoder."""
    return component != "vae" and not component.startswith("text_encoder")


class Technique(ABC):
    """One switch. A subclass overrides what it acts on; what it leaves alone stays stock."""

    name: str
    keys: tuple[str, ...] = ()  # of the config that it reads
    decides = True  # a bit of the picture, where it is on
    channels_last = False  # whether 4-D weights are packed channels-last
    through: frozenset[str] = frozenset()  # classes of modules that tiles stand still inside of: always cut further
    whole: frozenset[str] = frozenset()  # classes of modules that it acts inside of: they are not cut further
    parks = True  # whether skip connections may wait in host memory (``Blocks.parkable``)
    networks: tuple[str, ...] = ()  # paths of ControlNets that run in the denoiser's pass, as its ``controlnets``
    lanes = True  # whether samples may go through it side by side (``memory.lanes``)
    joins = True  # whether blocks with the skip connections between them may be one unit (``Blocks.stages``)
    period = 1  # steps after which it keeps nothing for the next one: a run can be taken up again there

    @classmethod
    @abstractmethod
    def of(cls, config: DictConfig) -> Technique | None:
        """As the config says; None: off."""

    @classmethod  # noqa: B027 - most can always act
    def check(cls, config: DictConfig) -> None:
        """Raises:
        ConfigError: it is asked for and could not act in this run; said before any work.
        """

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        """What of it decides the picture's bits, by dotted config keys; ``cache``: where hashes of files are kept."""
        return {}

    def packed(self, cache: Path) -> Mapping[str, Any]:
        """What of it decides the bytes of packed weights."""
        return self.fingerprint(cache)

    def touches(self, stage: str) -> bool:
        """Whether it has a part in ``stage`` (the module's name)."""
        return True

    def on_model(  # noqa: B027 - most have no part in it
        self, network: nn.Module, component: str
    ) -> None:
        """Change a network, on meta and before its weights are laid out."""

    def on_source(self, source: WeightSource, layout: Layout) -> WeightSource:
        """Change what the bytes of the weights are (LoRA, quantised files)."""
        return source

    def kept(self, network: nn.Module) -> frozenset[str]:
        """Names of the modules whose weights every pass needs, where some passes leave others out; none: all passes
        are alike."""
        return frozenset()

    def state(self, network_config: Mapping[str, Any], tile: Size) -> int:
        """Numbers, of the denoiser's dtype, that a sample of ``tile`` latents leaves for the next step."""
        return 0

    def streamer(self, network: nn.Module, layout: Layout, source: WeightSource, device: str) -> Any:
        """What gives the network its weights in place of the streaming that was planned; None: as planned."""
        return None

    def planned(self, model: ModelProfile) -> ModelProfile:
        """A model's profile as this leaves it: what stays in memory, how many samples go at once."""
        return model

    def turns(self, folder: Path) -> Any:
        """``canvas.mixture.Turns`` where the tiles of a step need one another, with scratch files in ``folder``."""
        return None

    def opening(self, canvas: Size) -> int:
        """Bytes that ``prepare`` takes, which are free again when a model is opened; ``canvas``: its pixels.

        Raises:
            ConfigError: it could not.
        """
        return 0

    def prepare(  # noqa: B027
        self, context: StageContext, canvas: Size, folder: Path
    ) -> None:
        """A stage begins, its model is not open yet; ``canvas``: its latents, ``folder``: for scratch."""

    def on_open(self, streamer: Any) -> None:  # noqa: B027
        """Change an open model (``models.loading.Streamer``)."""

    def begin(  # noqa: B027
        self, step: int, steps: int, folder: Path
    ) -> None:
        """A step of ``steps`` begins, the first is 0; its calls are of the same batches in every step. ``folder``:
        for scratch."""

    def before_call(  # noqa: B027
        self, batch: Any, step: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Change a denoiser's keyword arguments, each with a row a sample. A pure function of (batch, step) and of
        what was kept since the last ``period``: any group size and any resume give the same bytes."""

    def after_call(self, step: Tensor, predicted: Any) -> Any:
        """What a denoiser's network gave, valid until the next call; what it leaves here is the prediction."""
        return predicted
