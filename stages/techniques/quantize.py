"""``technique.quantize``: the denoiser's layers in 8-bit integers, or their weights only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError, close_match, dtype_of_component, on_gpu
from stages.families.facts import facts_of
from stages.memory.planner import Line
from stages.plans import CHUNK
from stages.techniques.base import SAMPLING, Technique, denoises

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.memory.layout import Layout, Slot
    from stages.memory.planner import ModelProfile
    from stages.memory.source import WeightSource

KEY = "technique.quantize"
WAYS = ("none", "int8", "int8_weights")
LEAST = 32  # numbers that a row of weights has: fewer (latents) are not worth it
MAKING = 16 << 20  # bytes: of what is read at a time
ROOMS = 24_000_000  # bytes that are kept between products, while a unit computes (``python -m benchmarks streaming``)
PRODUCTS = 3  # raised where whole numbers are multiplied or rounded otherwise, so that stored results are not mixed
_OUTSIDE = (
    "emb",
    "norm",
    "modulation",
)  # in names or classes of what surrounds a layer: it has one row a sample, and decides much


class Quantize(Technique):
    """``int8``: weights and samples (W8A8), sums in whole numbers. ``int8_weights``: weights are read and kept as
    integers, products are of floats.

    What stands outside of blocks (first and last layers), embeddings of time and modulations stay floats. LoRA and
    files of other formats (GGUF, fp8) come first: integers are made of what they give, once, for the prepared copy.
    """

    name = "quantize"
    keys = (KEY,)

    @classmethod
    def of(cls, config: DictConfig) -> Quantize | None:
        if config.technique.quantize == "none":
            return None
        kind = dtype_of_component(config, facts_of(config).denoiser)
        return cls(config.technique.quantize, floats=4 if kind == "fp32" else 2)

    def __init__(self, way: str, *, floats: int = 4) -> None:
        self.way, self.floats = way, floats  # bytes of a number that becomes an integer

    @classmethod
    def check(cls, config: DictConfig) -> None:
        way = config.technique.quantize
        if way not in WAYS:
            raise ConfigError(KEY, way, f"one of {', '.join(WAYS)}", close_match(str(way), WAYS))
        if way != "none" and on_gpu(config):
            raise ConfigError(KEY, way, "none on a GPU", "These layers are for processors.")
        if way != "none" and not config.memory.prepared:
            hint = "Integers would be made again in every pass; a copy of them is a quarter of the weights' size."
            raise ConfigError("memory.prepared", False, f"true with {KEY}={way}", hint)
        if way == "int8" and config.technique.compile != "none":
            hint = "The scales of samples are numbers of this very pass, which a program would keep."
            raise ConfigError("technique.compile", config.technique.compile, f"none with {KEY}=int8", hint)

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        return {KEY: self.way} | ({f"{KEY}.products": PRODUCTS} if self.way == "int8" else {})

    def touches(self, stage: str) -> bool:
        return stage in SAMPLING

    def planned(self, model: ModelProfile) -> ModelProfile:
        """With what it takes to make integers of samples, and of the largest layer for the copy, when there is no ring
        yet: they lie in its place, beside the part of the copy that they go to and the floats."""
        if not model.cuts:
            return model
        model = model.holding(ROOMS) if self.way == "int8" else model
        largest = max(model.cuts[-1].nbytes.values())
        making = Line(unit="", fixed=MAKING + max(CHUNK, largest) + largest * self.floats, slope=0, workspace=0)
        return replace(model, cuts=tuple(replace(cut, lines=(*cut.lines, making)) for cut in model.cuts))

    def on_model(self, network: nn.Module, component: str) -> None:
        from torch import nn

        from stages.int8 import Int8Conv2d, Int8Linear, exact, gated, one_by_one, share

        if not denoises(component):
            return
        samples = self.way == "int8"
        if samples and not exact():
            hint = "Without 8-bit dot products (VNNI, AMX) its sums run over: technique.quantize=int8_weights"
            raise ConfigError(KEY, self.way, "none or int8_weights on this processor", hint)
        for name, module in list(network.named_modules()):
            if not _inner(network, name):
                continue
            parent, _, own = name.rpartition(".")
            if type(module) is nn.Linear and module.in_features >= LEAST:
                setattr(network.get_submodule(parent), own, Int8Linear(module, samples=samples))
            elif type(module) is nn.Conv2d and Int8Conv2d.takes(module) and module.in_channels >= LEAST:
                setattr(network.get_submodule(parent), own, Int8Conv2d(module, samples=samples))
        for name, module in network.named_modules():
            if samples and name.endswith(".ff"):  # of UNets, with the widest activations: no larger than a leaf
                module.forward = partial(one_by_one, module, module.forward)
            if samples and type(module).__name__ == "GEGLU" and isinstance(module.proj, Int8Linear):
                module.forward = partial(gated, module.proj, module.forward)
            if samples:
                share(module)

    def on_source(self, source: WeightSource, layout: Layout) -> WeightSource:
        return QuantizingSource(source, layout)


class QuantizingSource:
    """Integers and their scales, made of a source of floats: rows of a weight have a scale each."""

    def __init__(self, source: WeightSource, layout: Layout) -> None:
        import torch

        self._source, self._dtype = source, layout.dtype
        self._weights = {
            name.removesuffix(".weight"): slot._replace(dtype=layout.dtype, offset=0)
            for name, slot in layout.slots.items()
            if slot.dtype is torch.int8
        }
        self._made: tuple[str, dict[str, Tensor]] = "", {}  # of the last layer: its scales are asked for next

    def read(self, slots: Sequence[Slot], start: int, packed: Tensor) -> None:
        floats = []
        for slot in slots:
            module, _, kind = slot.name.rpartition(".")
            if module in self._weights and kind != "bias":
                slot.view(packed, start).copy_(self._of(module)[kind])
            else:
                floats.append(slot)
        self._source.read(floats, start, packed)

    def _of(self, module: str) -> dict[str, Tensor]:
        import torch

        from stages.int8 import quantised

        made, found = self._made
        if made != module:
            found = {}  # the last layer's go first
            self._made = "", found
            slot = self._weights[module]
            weight = torch.empty(slot.nbytes, dtype=torch.uint8)
            self._source.read([slot], 0, weight)
            found = quantised(slot.view(weight, 0), self._dtype)
            self._made = module, found
        return found

    def close(self) -> None:
        self._made = "", {}
        self._source.close()


def _inner(network: nn.Module, name: str) -> bool:
    """Whether a layer is inside of blocks, and no embedding's or modulation's."""
    parent, _, own = name.rpartition(".")
    around = [own, *parent.split("."), type(network.get_submodule(parent)).__name__]
    return "." in name and not any(word in one.lower() for one in around for word in _OUTSIDE)
