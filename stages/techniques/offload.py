"""``technique.offload``: how weights come to where they are used, ours or as the libraries do it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError, close_match, on_gpu
from stages.schema import GroupOffloadConfig
from stages.techniques.base import Technique

if TYPE_CHECKING:
    from torch import nn

    from stages.memory.layout import Layout
    from stages.memory.planner import Cut, ModelProfile
    from stages.memory.source import WeightSource

KEY, GROUP = "technique.offload", "technique.group_offload"
WAYS = ("stream", "none", "model", "sequential", "group")
LEVELS = ("leaf_level", "block_level")


class Offload(Technique):
    """``stream``, the default, is ours: blocks, as the planner says. Weights are the same bytes on every way, and so
    are micro-batches: the picture is the same.

    ``none``: all weights stay. ``model``, ``sequential``: accelerate's hooks. ``group``: diffusers' group offload
    (https://huggingface.co/docs/diffusers/optimization/memory).
    """

    name = "offload"
    keys = (KEY, GROUP)
    decides = False

    @classmethod
    def of(cls, config: DictConfig) -> Offload | None:
        return None if config.technique.offload == "stream" else cls(config)

    def __init__(self, config: DictConfig) -> None:
        self.way, self.group = config.technique.offload, config.technique.group_offload
        self._folder = Path(config.output_dir)

    @classmethod
    def check(cls, config: DictConfig) -> None:
        way, group = config.technique.offload, config.technique.group_offload
        if way not in WAYS:
            raise ConfigError(KEY, way, f"one of {', '.join(WAYS)}", close_match(way, WAYS))
        if group.level not in LEVELS:
            raise ConfigError(f"{GROUP}.level", group.level, f"one of {', '.join(LEVELS)}")
        if way != "group" and group != OmegaConf.structured(GroupOffloadConfig):
            raise ConfigError(GROUP, OmegaConf.to_container(group), f"nothing with {KEY}={way}", f"{KEY}=group")
        if way in ("model", "sequential", "group") and not on_gpu(config):
            hint = "Its weights go to and fro between a processor and an accelerator: device=cuda"
            raise ConfigError(KEY, way, "stream or none on a CPU", hint)
        if way != "stream" and config.memory.weights == "streamed":
            raise ConfigError("memory.weights", "streamed", f"auto with {KEY}={way}", f"Or {KEY}=stream.")
        for key in ("decode.mode", "guide.vae_mode"):
            if way in ("sequential", "group") and OmegaConf.select(config, key) == "exact":
                hint = "An exact pass computes with a layer's weights outside of the layer, where no hook brings them."
                raise ConfigError(key, "exact", f"shared or independent with {KEY}={way}", hint)

    def streamer(self, network: nn.Module, layout: Layout, source: WeightSource, device: str) -> Any:
        from stages.memory.stock import StockModel, moved

        common: dict[str, Any] = {"layout": layout, "source": source}
        if self.way == "none":
            return StockModel(network, device=device, **common)
        options: dict[str, Any] = {}
        if self.way == "group":
            options = {"offload_type": self.group.level, "use_stream": self.group.stream}
            options |= {"num_blocks_per_group": 1} if self.group.level == "block_level" else {}
        if self.way == "group" and self.group.disk:
            self._scratch = tempfile.TemporaryDirectory(dir=self._folder, prefix=".offload-")  # goes with the process
            options["offload_to_disk_path"] = self._scratch.name
        return StockModel(network, device="cpu", hooked=moved(device, self.way, **options), **common)

    def planned(self, model: ModelProfile) -> ModelProfile:
        """One micro-batch a call, and of the weights what is on the device at a time."""
        return replace(model, streams=False, group=1, weights=self._resident(model))

    def _resident(self, model: ModelProfile) -> int:
        finest, copies = model.cuts[-1], 2 if self.group.stream else 1  # one computes while the next one comes
        if self.way == "sequential":
            return finest.largest
        if self.way == "group" and self.group.level == "leaf_level":
            return copies * finest.largest
        if self.way == "group":
            blocks = _blocks(finest)
            return sum(finest.nbytes.values()) - sum(blocks) + copies * max(blocks)
        return model.weights


def _blocks(cut: Cut) -> list[int]:
    """Bytes of the members of the network's lists of modules: diffusers' groups. What is in none of them stays."""
    found: dict[tuple[str, ...], int] = {}
    for name, size in cut.nbytes.items():
        parts = name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            key = tuple(parts[: place + 1])
            found[key] = found.get(key, 0) + size
    return list(found.values()) or [0]
