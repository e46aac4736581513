"""``technique.vae_tiling`` and ``technique.vae_slicing``: diffusers' own, beside ``decode.mode``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.techniques.base import Technique

if TYPE_CHECKING:
    from torch import nn

TILING, SLICING = "technique.vae_tiling", "technique.vae_slicing"


class VaeTiling(Technique):
    """The whole canvas goes to the decoder, which cuts it into tiles of the VAE's own size and blends them."""

    name = "vae_tiling"
    keys = (TILING,)

    @classmethod
    def of(cls, config: DictConfig) -> VaeTiling | None:
        return cls(config) if config.technique.vae_tiling else None

    def __init__(self, config: DictConfig) -> None:
        self._config = config

    @classmethod
    def check(cls, config: DictConfig) -> None:
        if config.technique.vae_slicing:
            hint = "A batch would be decoded picture by picture; here it is always one tile at a time."
            raise ConfigError(SLICING, True, "false", hint)
        if config.technique.vae_tiling and config.decode.mode != "independent":
            hint = "The other modes give tiles statistics of the whole picture, which diffusers' tiles do not ask for."
            raise ConfigError("decode.mode", config.decode.mode, f"independent with {TILING}=true", hint)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {TILING: True}

    def touches(self, stage: str) -> bool:
        return stage in ("decode", "profile")

    def on_model(self, network: nn.Module, component: str) -> None:
        vae: Any = network
        config = self._config
        if component != "vae" or not hasattr(vae, "decoder"):
            return
        side = min(config.decode.tile_size + 2 * config.decode.halo, max(config.width, config.height))
        own = getattr(vae, "tile_sample_min_size", None)
        if own is None or side <= own:
            hint = f"decode.tile_size={config.decode.tile_size} is not cut any further." if own else ""
            raise ConfigError(TILING, True, f"false for a decoder with tiles of {own} pixels", hint)
        vae.enable_tiling()
