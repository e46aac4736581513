"""The configuration: what its values may be, how those are derived that nobody gave, and how they are read.

No torch here. Sizes are pixels unless a name starts with ``latent_``; memory is bytes once parsed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("text_encode", "lowres", "guide", "denoise", "decode", "stitch")
BLENDS = ("gaussian", "cosine", "quartic", "constant")
GUIDE_MODES = ("sdedit", "hold", "skip_residual", "none")
VAE_MODES = ("independent", "shared", "exact")
DECODE_MODES = (*VAE_MODES, "taesd")
BACKENDS = ("auto", "gloo", "nccl")
WEIGHTS = ("auto", "streamed", "resident")
DTYPES = ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16")
LONGEST_SAID = 500  # characters of a value in a message


class ConfigError(ValueError):
    """A value that cannot work: names the key, what was got and what is allowed."""

    def __init__(self, key: str, got: Any, expected: str, hint: str = "") -> None:
        self.key, self._rest = key, (got, expected, hint)
        said = repr(got)
        said = said if len(said) <= LONGEST_SAID else f"{said[:LONGEST_SAID]}... ({len(said)} characters)"
        text = f"{key}: got {said}, expected {expected}."
        super().__init__(f"{text} {hint}" if hint else text)

    def under(self, key: str) -> ConfigError:
        """The same of another key."""
        return ConfigError(key, *self._rest)


def lowres_size(width: int, height: int, native: int, multiple: int, regions: bool = False) -> tuple[int, int]:
    """(width, height) of the low-res picture: the canvas' shape, scaled to the native area.

    With regions its short side is native: each is a picture of its own, and the model follows its prompt far better
    at its native size (two halves at 2:1, embedded model: 7 of 8 seeds as asked against 4 of 8).
    The short side never falls under half the native size (very long canvases are then denoised in
    tiles at low resolution too), and the picture is never larger than the canvas.
    """
    scale = native / math.sqrt(width * height)
    least = native if regions else native / 2
    scale = min(1.0, max(scale, least / min(width, height)))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))  # type: ignore[return-value]


def phase_sides(start: int, end: int, growth: float, multiple: int) -> list[int]:
    """Long sides of the canvases between ``start`` and ``end`` (pixels), evenly growing by at most ``growth``."""
    count = math.ceil(math.log(max(1.0, end / start)) / math.log(growth) - 1e-9) if growth > 1 else 1
    sides = [start * (end / start) ** (index / max(1, count)) for index in range(1, count)]
    rounded = [round(side / multiple) * multiple for side in sides]
    return [side for side in dict.fromkeys(rounded) if start < side < end]


def dtype_of_component(config: DictConfig, component: str) -> str:
    """fp32 | bf16 | fp16: what is asked for ``component``, ``auto`` resolved."""
    return resolve_dtype(config, config.technique.component_dtype.get(component))


def resolve(config: DictConfig) -> DictConfig:
    """Fill derived defaults in, so that the saved ``config.yaml`` names every value that is used."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(missing[0], "???", "a value")
    c = OmegaConf.to_container(config, resolve=False)
    assert isinstance(c, dict)
    native, factor = c["model"]["native_size"], c["model"]["vae_scale_factor"]
    denoise, decode, guide, lowres = c["denoise"], c["decode"], c["guide"], c["lowres"]
    token = factor * c["model"]["patch"]
    if lowres["width"] is None or lowres["height"] is None:
        size = lowres_size(c["width"], c["height"], native, c["model"]["size_multiple"], bool(c["regions"]))
        lowres["width"], lowres["height"] = lowres["width"] or size[0], lowres["height"] or size[1]
    guided = guide["mode"] != "none"
    if lowres["num_inference_steps"] is None:
        lowres["num_inference_steps"] = c["model"]["num_inference_steps"]
    if denoise["num_inference_steps"] is None:
        denoise["num_inference_steps"] = c["model"]["tile_num_inference_steps"]
    if lowres["guidance_scale"] is None:
        lowres["guidance_scale"] = c["model"]["guidance_scale"]
    if denoise["guidance_scale"] is None:
        denoise["guidance_scale"] = c["model"]["tile_guidance_scale" if guided else "guidance_scale"]
    if denoise["blend"] is None:
        denoise["blend"] = c["model"]["blend"]
    if denoise["strength"] is None:
        denoise["strength"] = c["model"]["strength"]
    if guide["phases"] is None:
        start = None if guide["image"] or not guided else max(lowres["width"], lowres["height"])
        longest = max(c["width"], c["height"])
        guide["phases"] = phase_sides(
            start or longest, longest, c["model"]["phase_growth"], c["model"]["size_multiple"]
        )
    if denoise["tile_size"] is None:
        denoise["tile_size"] = native
    if denoise["overlap"] is None:
        denoise["overlap"] = denoise["tile_size"] // 4 // token * token
    if decode["tile_size"] is None and c["technique"]["vae_tiling"]:
        decode["tile_size"] = -(-max(c["width"], c["height"]) // factor) * factor
    # 32 + 2*2 latents of tile and overlap and an 8-latent halo: the decoder sees 52x52 latents; in float32, with twice
    # the bytes, 44x44 (Stable Diffusion 1.5 then fits 800 MB on a processor without bf16 too: 750 MB for 840)
    if decode["tile_size"] is None:
        wide = dtype_of_component(config, "vae") == "fp32"
        decode["tile_size"] = (28 if wide else 36) * factor
    if decode["overlap"] is None:
        decode["overlap"] = min(4 * factor, decode["tile_size"] // 2 // factor * factor)
    if decode["halo"] is None:
        decode["halo"] = 8 * factor
    if guide["tile_size"] is None:
        guide["tile_size"] = 32 * factor
    return OmegaConf.merge(config, c)  # type: ignore[return-value]


_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*$", re.IGNORECASE)


def parse_bytes(text: str | int, key: str = "memory.budget") -> int:
    """``"800MB"`` -> 800_000_000, ``"1GiB"`` -> 1073741824; a bare number is bytes."""
    match = _BYTES.match(str(text))
    if not match:
        raise ConfigError(key, text, "a size such as 800MB, 1.5GB, 600MiB")
    unit = match[2].lower().rstrip("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " kmgt".index(unit[:1] or " "))


def max_memory(config: DictConfig) -> dict[int, int] | int | None:
    """``device.max_memory``: bytes by GPU, of every GPU, or None: all that there is.

    Raises:
        ConfigError: no size, or no number of a GPU.
    """
    given, key = config.max_memory, "device.max_memory"
    if not isinstance(given, Mapping):
        return None if given is None else parse_bytes(given, key)
    if bad := [name for name in given if not str(name).isdigit()]:
        raise ConfigError(key, bad[0], "numbers of GPUs, as in {0: 16GB, 1: 16GB}")
    return {int(name): parse_bytes(size, key) for name, size in given.items()}


def close_match(got: str, allowed: Iterable[str]) -> str:
    """'Did you mean X?' for a likely typo, else ''."""
    found = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f"Did you mean {found[0]}?" if found else ""


def on_gpu(config: DictConfig) -> bool:
    """Whether this run computes on a GPU."""
    return str(config.device).startswith("cuda")


def resolve_dtype(config: DictConfig, wanted: str | None = None) -> str:
    """The dtype that a stage computes in (``wanted``, or the config's), ``auto`` resolved without torch: fp32 | bf16 |
    fp16.

    On the CPU bf16 is chosen where the processor multiplies in it (elsewhere it is emulated and slow); fp16 never.
    """
    wanted = str(wanted or config.technique.dtype)
    if wanted != "auto":
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(wanted, wanted)
    if on_gpu(config):
        return "fp16"
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_field("flags", "features").split()) else "fp32"


def cpu_field(*names: str) -> str:
    """What the system says of the first processor under one of these lower-case names; "" where it does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip().lower() in names), "")
