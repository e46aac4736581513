"""Files of adapters (LoRA, LoCon, DoRA, LoHa, LoKr): what their headers say. No torch.

Names are those of kohya and AUTOMATIC1111 (``lora_unet_..``), of diffusers and PEFT (``unet...lora_A``), of ComfyUI
(``diffusion_model...``) and of LyCORIS. https://github.com/KohakuBlueleaf/LyCORIS, docs/Network-Args.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from stages.config import ConfigError
from stages.families.facts import Facts
from stages.memory.ggml import is_gguf
from stages.memory.raw import Entry, read_described

KEY = "model.loras"
EXPECTED = "a list of files: [{path: FILE, scale: 0.8}, FILE, FILE:0.8]"
_ENDINGS = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight"), "down"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight"), "up"),
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_B.bias": "bias",
    "dora_scale": "dora_scale",
    **dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"),
    **{name: name for name in ("alpha", "diff", "scalar")},
    "diff_b": "bias",
    "w_norm": "diff",
    "b_norm": "bias",
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_ENDING = re.compile("|".join(rf"[._]{re.escape(end)}$" for end in sorted(_ENDINGS, key=len, reverse=True)))
_PEFT = "lora_adapter_metadata"  # diffusers writes PEFT's configuration there
_TRAINED_ON = ("ss_base_model_version", "modelspec.architecture")  # what trainers write
# before the names of modules; a number of kohya's is that of the encoder, 3 is T5
_TEXT = {
    **dict.fromkeys(("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l."), "text_encoder"),
    **dict.fromkeys(("lora_te2_", "text_encoder_2.", "text_encoders.clip_g."), "text_encoder_2"),
    **dict.fromkeys(("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl."), "T5"),
}
_DENOISER = (
    *("lora_unet_", "lora_transformer_", "lycoris_", "unet.", "transformer.", "model.diffusion_model."),
    *("diffusion_model.", "base_model.model."),
)


class Strength(NamedTuple):
    """One adapter that is asked for."""

    path: str
    scale: float = 1.0

    @property
    def tag(self) -> str:
        """As prompts name it."""
        return f"<lora:{Path(self.path).stem}:{self.scale:g}>"


def strengths(config: DictConfig) -> list[Strength]:
    """What ``model.loras`` asks for, in order.

    Raises:
        ConfigError: no list of files and numbers.
    """
    given = config.model.loras
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return [_strength(entry) for entry in listed]


def _strength(entry: Any) -> Strength:
    if isinstance(entry, str):
        path, _, last = entry.rpartition(":")
        scale = _number(last)
        entry = {"path": entry} if not path or scale is None or Path(entry).exists() else {"path": path, "scale": scale}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not {"path", "scale"} >= set(entry):
        raise ConfigError(KEY, entry, EXPECTED)
    scale = _number(entry.get("scale", 1.0))
    if scale is None:
        raise ConfigError(f"{KEY} (scale of {entry['path']})", entry.get("scale"), "a number, such as 0.8")
    return Strength(entry["path"], scale)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


class Module(NamedTuple):
    """What a file has of one module: role -> the tensor that plays it, under its name in the file."""

    tensors: Mapping[str, tuple[str, Entry]]

    @property
    def shape(self) -> tuple[int, int] | None:
        """(rows, numbers of a row) of the delta; None where parts of it are missing, or only a bias is there."""
        shapes = {role: entry.shape for role, (_, entry) in self.tensors.items()}
        if "diff" in shapes:
            return shapes["diff"][0], math.prod(shapes["diff"][1:])
        if {"up", "down"} <= shapes.keys():
            kernel = math.prod(shapes["mid"][2:]) if "mid" in shapes else math.prod(shapes["down"][2:])
            return shapes["up"][0], shapes["down"][1] * kernel
        if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= shapes.keys():
            if "hada_t1" in shapes:
                return shapes["hada_w1_a"][1], shapes["hada_w1_b"][1] * math.prod(shapes["hada_t1"][2:])
            return shapes["hada_w1_a"][0], math.prod(shapes["hada_w1_b"][1:])
        left, right = _kronecker(shapes, "lokr_w1"), _kronecker(shapes, "lokr_w2")
        if left is None or right is None:
            return None
        return left[0] * right[0], math.prod((left[1], *right[1:]))


def _kronecker(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    if name in shapes:
        return shapes[name]
    if f"{name}_a" not in shapes or f"{name}_b" not in shapes:
        return None
    rows, columns = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in shapes:
        return rows[1], columns[1], *shapes["lokr_t2"][2:]
    return rows[0], *columns[1:]


class Adapter(NamedTuple):
    """One file: its modules by their names there, tensors of no kind that is known, and what it says of itself."""

    path: Path
    modules: Mapping[str, Module]
    others: tuple[str, ...]
    described: Mapping[str, Any]

    def alpha(self, name: str) -> float | None:
        """Of a module whose tensors do not say, as PEFT's configuration in the header does; None: its rank."""
        config = self._peft(name.partition(".")[0])
        default = config.get("lora_alpha")
        found = _pattern(config.get("alpha_pattern"), name, default)
        if not isinstance(found, int | float) or "down" not in self.modules[name].tensors:
            return None
        rank = self.modules[name].tensors["down"][1].shape[0]
        return found * math.sqrt(rank) if config.get("use_rslora") else float(found)

    def _peft(self, part: str) -> dict[str, Any]:
        try:
            said = json.loads(self.described.get(_PEFT, "{}"))
        except ValueError:
            return {}
        said = said if isinstance(said, dict) else {}
        return {key.removeprefix(f"{part}."): value for key, value in said.items() if key.startswith(f"{part}.")}

    @property
    def trained_on(self) -> str:
        """What it is for, as far as it says; "" if it does not."""
        return next((str(self.described[key]) for key in _TRAINED_ON if self.described.get(key)), "")


def _pattern(patterns: Any, name: str, default: Any) -> Any:
    """PEFT's exceptions by a module's name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if name == pattern.lstrip("^") or name.endswith(f".{pattern.lstrip('^')}"):
            return value
    return default


def open_adapter(path: Path) -> Adapter:
    """Read the header of a safetensors file.

    Raises:
        ValueError: torn or foreign.
    """
    stat = path.stat()
    return _opened(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _opened(path: Path, _time: int, _size: int) -> Adapter:
    if is_gguf(path):
        raise ValueError(f"{path}: a GGUF file, expected safetensors.")
    entries, described = read_described(path)
    found: dict[str, dict[str, tuple[str, Entry]]] = {}
    others = []
    for name, entry in entries.items():
        ending = _ENDING.search(name)
        if ending is None:
            others.append(name)
        else:
            found.setdefault(name[: ending.start()], {})[_ENDINGS[ending[0][1:]]] = (name, entry)
    return Adapter(path, {name: Module(tensors) for name, tensors in found.items()}, tuple(others), described)


def place(name: str, facts: Facts) -> tuple[str, str]:
    """(component, name of the module in it, its dots as the file writes them) of a module of a file."""
    for prefix, component in _TEXT.items():
        if name.startswith(prefix):
            rest = name[len(prefix) :].removeprefix("transformer.")
            if component == "T5":
                component = next((one for one, kind in facts.classes.items() if "T5" in kind), "text_encoder_3")
            return component, rest
    prefix = next((prefix for prefix in _DENOISER if name.startswith(prefix)), "")
    return facts.denoiser, name[len(prefix) :]
