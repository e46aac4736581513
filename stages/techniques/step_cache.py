"""``technique.step_cache``: what the deep layers of a UNet gave serves ``interval`` steps, the others run every time.

DeepCache (arXiv 2312.00858): from one step to the next the deep features hardly change. Cut at the skip connection
``depth``, a UNet falls into the layers that give the first skip connections and read them again, and all the rest. A
full pass leaves what the rest handed over; until the next one it is handed over again, and the weights of the rest are
neither read nor in memory where they are streamed. The others stay in memory.

The features of one group of tiles stay where they are; those of several lie in a file. A run is taken up again at a
full step, so nothing of this is in a checkpoint.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from stages.config import ConfigError, on_gpu
from stages.families.facts import facts_of
from stages.techniques.base import SAMPLING, Technique

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stages.memory.planner import ModelProfile
    from stages.tiles import Size

KEY = "technique.step_cache"
INTERVAL, DEPTH = f"{KEY}.interval", f"{KEY}.depth"
INPUT = "deep_features"
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


class StepCache(Technique):
    """Every ``interval``-th step is whole."""

    name = "step_cache"
    keys = (INTERVAL, DEPTH)
    joins = False  # a stage that is cut is no unit

    @classmethod
    def of(cls, config: DictConfig) -> StepCache | None:
        return cls(config) if _interval(config) != 1 else None

    def __init__(self, config: DictConfig) -> None:
        self.period, self.depth = _interval(config), config.technique.step_cache.depth
        self._gpu = on_gpu(config)
        self._full, self._number = True, -1  # whether all runs in this step, and which of its calls is due
        self._held: Tensor | None = None  # of the last call
        self._lying: list[_Lying] = []  # of the calls before it
        self._file = Path()

    @classmethod
    def check(cls, config: DictConfig) -> None:
        interval, depth = _interval(config), config.technique.step_cache.depth
        if not 1 <= interval <= 1000:
            raise ConfigError(INTERVAL, interval, "1 (off) to 1000 steps")
        if depth < 0 or (depth and interval == 1):
            hint = f"{INTERVAL}=5 uses what lies below a skip connection for five steps."
            raise ConfigError(DEPTH, depth, f"0 with {INTERVAL}={interval}" if depth > 0 else "0 or more", hint)
        if interval == 1:
            return
        if not facts_of(config).unet:
            hint = (
                "A transformer has no skip connections to cut it at. What is kept for these (cache-dit, diffusers' "
                "own hooks) compares a call with the one before it, which here was of other tiles."
            )
            raise ConfigError(INTERVAL, interval, "1 for a transformer", hint)
        if config.technique.offload == "group":
            hint = "diffusers' groups are fetched in the order of a whole pass."
            raise ConfigError(INTERVAL, interval, "1 with technique.offload=group", hint)
        if config.technique.compile == "compile":
            hint = "torch.compile knows one pass of a model, and here are two: technique.compile=trace"
            raise ConfigError(INTERVAL, interval, "1 with technique.compile=compile", hint)
        if config.device_map is not None:
            hint = "accelerate brings skip connections to the GPU of a whole stage, and one of them is cut."
            raise ConfigError(INTERVAL, interval, f"1 with device.device_map={config.device_map}", hint)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {INTERVAL: self.period, DEPTH: self.depth}

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    # -- the network --------------------------------------------------------------------------------------------

    def on_model(self, network: nn.Module, component: str) -> None:
        part, last = self._cut(network)
        whole: Any = network.forward
        given = threading.local()  # what the deep layers gave: samples may go through the network side by side

        def take() -> Tensor:
            features, given.features = given.features, None
            return features

        last.register_forward_hook(lambda module, inputs, output: setattr(given, "features", _first(output)))
        part.mid_block.forward = lambda *_: take()

        def forward(*, deep_features: Tensor | None = None, **inputs: Any) -> Any:
            given.features = deep_features  # and nothing of a pass that did not come to its end
            if deep_features is not None:
                return part(**inputs)
            (sample,) = whole(**inputs)
            return ((sample, take()),)

        network.forward = forward

    def kept(self, network: nn.Module) -> frozenset[str]:
        inside = set(map(id, self._cut(network)[0].modules()))
        return frozenset(name for name, module in network.named_modules() if id(module) in inside)

    def _cut(self, network: Any) -> tuple[Any, nn.Module]:
        """The layers that run in every step, as a UNet of their own; and the one of the others whose result is the
        last that they get of these."""
        from torch import nn

        known = all(type(one).__name__ in DOWN for one in network.down_blocks)
        if not (known and all(type(one).__name__ in UP for one in network.up_blocks) and network.mid_block):
            raise ConfigError(INTERVAL, self.period, "1", "This UNet is made of other blocks than those that are cut.")
        up = [(stage, layer) for stage in network.up_blocks for layer in range(len(stage.resnets))]
        if self.depth >= len(up):
            raise ConfigError(DEPTH, self.depth, f"at most {len(up) - 1}: the UNet has {len(up)} skip connections")
        stage, layer = up[-1 - self.depth]
        place = list(network.up_blocks).index(stage)
        if layer:
            last = list(getattr(stage, "attentions", stage.resnets))[layer - 1]
        else:
            last = network.up_blocks[place - 1].upsamplers[-1] if place else network.mid_block
        down = nn.ModuleList(_down(network, self.depth))
        above = nn.ModuleList([_layers(stage, slice(layer, None)), *network.up_blocks[place + 1 :]])
        return _with(network, down_blocks=down, mid_block=nn.Identity(), up_blocks=above), last

    # -- what is kept -------------------------------------------------------------------------------------------

    def state(self, network_config: Mapping[str, Any], tile: Size) -> int:
        widths, layers = network_config["block_out_channels"], network_config.get("layers_per_block", 2)
        counts = [layers] * len(widths) if isinstance(layers, int) else layers
        read = [(level, place == count) for level, count in enumerate(counts) for place in range(count + 1)]
        level, first = read[self.depth]  # where the skip connection is read, and whether first of all there
        width = widths[min(level + first, len(widths) - 1)]
        return width * -(-tile.height // 2**level) * -(-tile.width // 2**level)

    def planned(self, model: ModelProfile) -> ModelProfile:
        """On a GPU with the features twice: as they are kept, and as a recorded pass reads them."""
        more = 2 * model.state * model.micro_batch if self._gpu else 0
        cuts = tuple(
            replace(cut, lines=tuple(replace(line, slope=line.slope + more) for line in cut.lines))
            for cut in model.cuts
        )
        return replace(model, cuts=cuts, cached=model.steps - -(-model.steps // self.period))

    def begin(self, step: int, steps: int, folder: Path) -> None:
        self._full, self._number = step % self.period == 0, -1
        if self._full:
            self._held, self._lying, self._file = None, [], folder / "deep_features.bin"

    def before_call(self, batch: Any, step: Tensor, inputs: dict[str, Tensor]) -> None:
        self._number += 1
        if self._held is not None and self._number != len(self._lying):  # it is of another call
            self._put_away(self._held)
        if not self._full:
            held = self._lying[self._number].read(self._file) if self._held is None else self._held
            inputs[INPUT] = held.to(inputs["sample"].device)

    def after_call(self, step: Tensor, predicted: Any) -> Any:
        from stages.memory.micro import laid_out

        if isinstance(predicted, tuple):
            predicted, features = predicted
            if not step.is_meta:
                self._held = laid_out(features.clone() if features.is_cuda else features)
        return predicted

    def _put_away(self, features: Tensor) -> None:
        start = self._lying[-1].end if self._lying else 0
        self._lying.append(_Lying.write(self._file, start, features))
        self._held = None


def _interval(config: DictConfig) -> int:
    interval = config.technique.step_cache.interval
    return 1 if interval is None else interval


class _Lying(NamedTuple):
    """Where features lie in a file, and how they lay in memory: later kernels choose by that how they round."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def write(cls, file: Path, start: int, features: Tensor) -> _Lying:
        """``features [N, C, h, w]`` into ``file``, from byte ``start`` on. It is not synced."""
        import torch

        from stages.memory.raw import pwrite_all

        last = features.is_contiguous(memory_format=torch.channels_last)
        flat = (features.permute(0, 2, 3, 1) if last else features).cpu().contiguous().view(-1).view(torch.uint8)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        try:
            pwrite_all(descriptor, start, memoryview(flat.numpy()))
        finally:
            os.close(descriptor)
        return cls(start, start + len(flat), tuple(features.shape), features.dtype, last)

    def read(self, file: Path) -> Tensor:
        """What was written, as it lay."""
        import torch

        from stages.memory.raw import pread_into

        flat = torch.empty(self.end - self.start, dtype=torch.uint8)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            pread_into(descriptor, self.start, memoryview(flat.numpy()))
        finally:
            os.close(descriptor)
        count, channels, height, width = self.shape
        if not self.channels_last:
            return flat.view(self.dtype).view(self.shape)
        return flat.view(self.dtype).view(count, height, width, channels).permute(0, 3, 1, 2)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with(module: Any, **children: Any) -> Any:
    """A copy with other children; weights are the same objects."""
    made = copy.copy(module)
    made._modules = {**module._modules, **children}
    return made


def _layers(stage: Any, which: slice, **children: Any) -> Any:
    """A stage of a UNet with some of its layers."""
    from torch import nn

    names = [name for name in ("resnets", "attentions") if hasattr(stage, name)]
    lists = {name: nn.ModuleList(getattr(stage, name)[which]) for name in names}
    return _with(stage, **lists, **children)


def _down(network: Any, depth: int) -> list[Any]:
    """What gives the skip connections up to number ``depth``; the first of all is of no stage."""
    found, left = [], depth
    for stage in network.down_blocks if depth else ():
        layers = len(stage.resnets)
        if left <= layers:
            return [*found, _layers(stage, slice(left), downsamplers=None)]
        found.append(stage)
        left -= layers + 1
        if not left:
            break
    return found
