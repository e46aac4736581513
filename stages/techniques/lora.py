"""``model.loras``: low-rank adapters, added to the weights as they are read. No torch before a weight is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from stages.config import ConfigError
from stages.families.facts import Facts, facts_of
from stages.hashes import file_hash
from stages.paths import PICKLES, is_weights_file
from stages.techniques.base import Technique
from stages.techniques.lora_file import KEY, Adapter, Strength, open_adapter, place, strengths
from stages.techniques.lora_fit import fit

if TYPE_CHECKING:
    from torch import nn

    from stages.memory.layout import Layout, Slot
    from stages.memory.planner import ModelProfile
    from stages.memory.source import WeightSource

WORK = 3 * 4 << 20  # bytes: of a weight, its delta and their sum, as many rows as are made at a time
_LINEAR, _OUT = re.compile(r"(?:keys|queries)\.(to_q|to_k|to_v|to_out)$"), {"to_out": "to_out.0"}
_STAGES = ("lowres", "denoise")


class Lora(Technique):
    """Adapters of the denoiser (https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference, as
    ``load_lora_weights`` and ``fuse_lora`` do it). Their weights are read with those of a block, at every reading of
    the checkpoint; a prepared copy holds the sum."""

    name = "lora"
    keys = (KEY,)
    mark = KEY  # in fingerprints
    stages = _STAGES

    @classmethod
    def of(cls, config: DictConfig) -> Technique | None:
        facts = facts_of(config) if config.model.loras else None
        own = [one for one in strengths(config) if facts and cls.takes(open_adapter(Path(one.path)), facts)]
        return cls(own, facts) if own and facts else None

    def __init__(self, given: Sequence[Strength], facts: Facts) -> None:
        self._given, self._facts = given, facts
        self._network: nn.Module | None = None
        self._component = ""

    @staticmethod
    def takes(adapter: Adapter, facts: Facts) -> bool:
        """Whether a file is for the denoiser, or for nothing, which is refused where the denoiser is looked at."""
        found = {place(name, facts)[0] for name in adapter.modules}
        return facts.denoiser in found or not found & set(facts.classes)

    @classmethod
    def check(cls, config: DictConfig) -> None:
        for one in strengths(config):
            path, expected = Path(one.path), "a .safetensors file of an adapter (LoRA, LoHa, LoKr)"
            if path.suffix.lower() in PICKLES:
                hint = "Unpickling runs code from the file. Take the .safetensors file of it."
                raise ConfigError(KEY, one.path, expected, hint)
            if not is_weights_file(path):
                raise ConfigError(KEY, one.path, expected, "A relative path starts in the current folder.")
            try:
                adapter = open_adapter(path)
            except ValueError as error:
                raise ConfigError(KEY, one.path, expected, str(error)) from None
            if not any(module.shape for module in adapter.modules.values()):
                first = next(iter((*adapter.modules, *adapter.others)), "nothing")
                raise ConfigError(KEY, one.path, expected, f"There is none in it; it holds {first}.")

    def fingerprint(self, cache: Path) -> Mapping[str, Any]:
        found = [{"sha256": file_hash(Path(one.path), cache), "scale": one.scale} for one in self._given]
        return {self.mark: found}

    def touches(self, stage: str) -> bool:
        return stage in (*self.stages, "rehearsal")

    def planned(self, model: ModelProfile) -> ModelProfile:
        """With an adapter's largest module, and the rows that are made at a time."""
        modules = [module for one in self._given for module in open_adapter(Path(one.path)).modules.values()]
        largest = max(sum(4 * math.prod(entry.shape) for _, entry in module.tensors.values()) for module in modules)
        whole = [module.shape for module in modules if _by_column(module.tensors) and module.shape]
        more = 2 * largest + max([WORK, *(3 * 4 * math.prod(shape) for shape in whole)])
        return model.holding(more)

    def on_model(self, network: nn.Module, component: str) -> None:
        self._network, self._component = network, component

    def on_source(self, source: WeightSource, layout: Layout) -> WeightSource:
        from stages.memory.deltas import Delta, DeltaSource
        from stages.memory.tensors import read_header

        weights, network = _weights(layout.slots), self._network
        shapes = {module: (sum(slot.shape[0] for slot in own), *own[0].shape[1:]) for module, own in weights.items()}
        config = getattr(network, "config", None)
        described = config if isinstance(config, Mapping) else {}
        deltas: dict[str, list[Delta]] = {}
        for one in self._given:
            adapter, refs = open_adapter(Path(one.path)), read_header(Path(one.path))
            fits = fit(adapter, self._component, self._facts, type(network).__name__, described, shapes)
            for module, placed in fits.placed.items():
                for name, first in placed:
                    alpha = adapter.alpha(name)
                    parts = {role: refs[own] for role, (own, _) in adapter.modules[name].tensors.items()}
                    bias = parts.pop("bias", None)
                    for slot in weights[module] if adapter.modules[name].shape else ():
                        delta = Delta(parts, first, one.scale, alpha)
                        deltas.setdefault(slot.name, []).append(delta)
                        first += slot.shape[0]
                    if bias is not None and f"{module}.bias" in layout.slots:
                        deltas.setdefault(f"{module}.bias", []).append(Delta({"diff": bias}, 0, one.scale))
        return DeltaSource(source, deltas) if deltas else source


class TextLora(Lora):
    """Adapters of text encoders."""

    name = "text_lora"
    mark = f"{KEY} (text encoders)"
    stages = ("text_encode",)

    @classmethod
    def check(cls, config: DictConfig) -> None:
        """The files are those that ``Lora`` has checked."""

    @staticmethod
    def takes(adapter: Adapter, facts: Facts) -> bool:
        return bool({place(name, facts)[0] for name in adapter.modules} & (set(facts.classes) - {facts.denoiser}))


def _by_column(roles: Mapping[str, Any]) -> bool:
    return "dora_scale" in roles and roles["dora_scale"][1].shape[0] == 1


def _weights(slots: Mapping[str, Slot]) -> dict[str, list[Slot]]:
    """The weight of each module: one slot, or those of the slices that it is loaded in. Linear attention in the place
    of a UNet's has its names."""
    found: dict[str, list[Slot]] = {}
    for name, slot in slots.items():
        module, _, last = name.rpartition(".")
        if last == "weight":
            module = _LINEAR.sub(lambda part: _OUT.get(part[1], part[1]), module.partition(".slices.")[0])
            found.setdefault(module, []).append(slot)
    return found
