"""Structured configuration: the dataclasses behind ``conf/``, how defaults are derived, and what is refused.

No torch here. Sizes are pixels unless a name starts with ``latent_``; memory is bytes once parsed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("text_encode", "lowres", "guide", "denoise", "decode", "stitch")
BLENDS = ("gaussian", "cosine", "quartic", "constant")
GUIDE_MODES = ("sdedit", "hold", "skip_residual", "none")
DECODE_MODES = ("independent", "shared", "exact")
BACKENDS = ("auto", "gloo", "nccl")
WEIGHTS = ("auto", "streamed", "resident")
DTYPES = ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16")


LONGEST_SAID = 500  # characters of a value in a message


class ConfigError(ValueError):
    """A value that cannot work: names the key, what was got and what is allowed."""

    def __init__(self, key: str, got: Any, expected: str, hint: str = "") -> None:
        self.key = key
        said = repr(got)
        said = said if len(said) <= LONGEST_SAID else f"{said[:LONGEST_SAID]}... ({len(said)} characters)"
        text = f"{key}: got {said}, expected {expected}."
        super().__init__(f"{text} {hint}" if hint else text)


@dataclass(kw_only=True)
class ModelConfig:
    """Which checkpoint, and what cannot be read from it."""

    name: str = MISSING
    family: str = MISSING  # sd
    path: str = MISSING  # diffusers folder, hub id, or a single .safetensors file
    denoiser: str | None = None  # a .safetensors or .gguf file whose UNet or transformer takes the place of path's
    revision: str | None = None  # of a hub id
    config: str | None = None  # of a single file: a diffusers folder with configs, tokenizer, and what the file lacks
    prediction_type: str | None = None  # epsilon | v_prediction; None: as the checkpoint's scheduler config says
    native_size: int = MISSING  # pixels a side that the denoiser was trained at
    cpu_size: int | None = None  # native_size on a CPU, where 800 MB do not hold tiles of the trained one
    fp32_size: int | None = None  # and where a CPU computes in float32
    vae_scale_factor: int = 8
    latent_channels: int = 4
    patch: int = 1  # latents a side that the denoiser joins to a token: sides are multiples of vae_scale_factor * patch
    size_multiple: int = 8  # low-res sides are rounded to this many pixels
    phase_growth: float = 4.0  # how much larger one upscaling phase may make the picture
    guidance_scale: float = 7.5  # default of lowres.guidance_scale
    tile_guidance_scale: float = 7.5  # default of denoise.guidance_scale with a guide
    strength: float = 0.4  # default of denoise.strength


@dataclass(kw_only=True)
class SchedulerConfig:
    """A diffusers scheduler class, made from the checkpoint's scheduler config plus ``options``."""

    name: str = MISSING
    class_name: str | None = None  # None: the class named in the checkpoint
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class MemoryConfig:
    """The declared budget and how it is kept."""

    budget: str = "800MB"  # peak RES of runner + stage
    enforce: str = "auto"  # auto | cgroup | watchdog | off
    device_budget: str | None = None  # what the GPU allocator may reserve; None: no limit
    host: str = "pinned"  # pinned | disk: where a GPU run keeps the weights
    weights: str = "auto"  # auto | streamed | resident: what the planner may choose; the picture is the same
    prepared: bool = True  # keep a copy of streamed weights in compute layout in the store


@dataclass(kw_only=True)
class GroupOffloadConfig:
    """diffusers' group offload, for ``technique.offload=group``."""

    level: str = "leaf_level"  # leaf_level | block_level
    stream: bool = True  # the next group comes while one computes
    disk: bool = False  # groups wait in files, not in RAM


@dataclass(kw_only=True)
class TomeConfig:
    """Token merging, of UNets."""

    ratio: float = 0.0  # share of the tokens of the finest level that are merged, at most 0.75; 0: off


@dataclass(kw_only=True)
class TechniqueConfig:
    """Numeric switches that can be compared."""

    dtype: str = "auto"  # auto | fp32 | bf16 | fp16 (or float32 | bfloat16 | float16): of the computation
    component_dtype: dict[str, str] = field(default_factory=dict)  # of one component: technique.dtype.vae=fp32
    channels_last: bool = True
    tf32: bool = False
    attention: str = "auto"  # auto | sdpa | math | sliced | xformers, or a name of diffusers' dispatcher
    offload: str = "stream"  # stream | none | model | sequential | group: how weights come to where they are used
    group_offload: GroupOffloadConfig = field(default_factory=GroupOffloadConfig)
    tome: TomeConfig = field(default_factory=TomeConfig)
    vae_tiling: bool = False  # diffusers' own tiles, of the whole canvas, with decode.mode=independent
    vae_slicing: bool = False
    compile: str = "none"  # none | compile (torch.compile) | trace (torch.jit.trace), with offload=none


@dataclass(kw_only=True)
class LaunchConfig:
    """How stage processes are started and watched."""

    threads: int | None = None  # torch threads; None: all cores
    sample_seconds: float = 0.02  # memory sampling period
    nproc: int = 1  # ranks of a stage that share its tiles, each with a GPU of its own and memory.budget for itself
    backend: str = "auto"  # auto | gloo | nccl: how they talk; auto: gloo on the CPU, nccl on GPUs
    timeout: float = 1800.0  # seconds that one waits for another


@dataclass(kw_only=True)
class TextEncodeConfig:
    """Prompt to embeddings."""

    clip_skip: int | None = None  # as in diffusers: layers skipped from the end


@dataclass(kw_only=True)
class LowresConfig:
    """The low-resolution picture that guides the canvas."""

    num_inference_steps: int = 25
    guidance_scale: float | None = None  # derived: model.guidance_scale
    width: int | None = None  # derived: the canvas' shape at the native area
    height: int | None = None


@dataclass(kw_only=True)
class GuideConfig:
    """How the low-res picture (or the user's own) guides the canvas."""

    mode: str = "sdedit"
    image: str | None = None
    fit: str = "crop"  # crop | stretch: an image of another shape than the canvas
    upscale: str = "lanczos"  # lanczos | latent
    phases: Any = None  # long sides of smaller canvases on the way up, pixels; [] for none; derived
    vae_mode: str = "shared"  # independent | shared | exact, as decode.mode
    tile_size: int | None = None  # of the tiled encode, pixels; derived
    hold_steps: float = 0.3  # hold: share of the steps that are overwritten with the noised guide
    skip_residual_power: float = 3.0  # skip_residual: exponent a of DemoFusion's cosine weight


@dataclass(kw_only=True)
class DilatedConfig:
    """DemoFusion's dilated sampling: a global look at the canvas in every step, up to twice the passes."""

    enabled: bool = False
    cosine_scale: float = 1.0  # exponent of its weight, which falls with the noise
    sigma: float = 0.8  # latents: of the blur before it, where the noise is strongest
    sigma_scale: float = 1.0  # exponent of the blur's fall


@dataclass(kw_only=True)
class DenoiseConfig:
    """Mixture of Diffusers over the canvas."""

    num_inference_steps: int = 20
    guidance_scale: float | None = None  # derived: model.tile_guidance_scale; without a guide model.guidance_scale
    strength: float | None = None  # derived: model.strength
    tile_size: int | None = None  # pixels; derived: native size
    overlap: int | None = None  # pixels; derived: a quarter of the tile
    blend: str = "gaussian"
    dilated: DilatedConfig = field(default_factory=DilatedConfig)


@dataclass(kw_only=True)
class DecodeConfig:
    """Latents to pixels, tile by tile."""

    mode: str = "shared"
    tile_size: int | None = None  # pixels of a decoded tile without its halo; derived
    overlap: int | None = None  # pixels that neighbours share and stitch blends; derived
    halo: int | None = None  # pixels of context decoded around a tile and thrown away; derived


@dataclass(kw_only=True)
class StitchConfig:
    """Pixel tiles to one file."""

    format: str = "png"  # png | tiff | deepzoom: what is written beside image.png
    compression: int = 6  # zlib level of the PNG


@dataclass(kw_only=True)
class Config:
    """Everything a run is made from."""

    prompt: str | None = None  # required; the empty text is a prompt too
    negative_prompt: str = ""
    prompt_file: str | None = None
    width: int = 2048
    height: int = 2048
    seed: int = 0
    run: str | None = None  # folder under output_dir; derived from prompt and parameters
    stage: Any = "all"  # all | plan | NAME | [NAME, NAME]
    force: bool = False
    progress: bool = True
    output_dir: str = "outputs"
    regions: Any = None  # a list, a mapping, or the name of a file with either
    reroll: list[Any] = field(default_factory=list)
    device: str = "cpu"
    device_map: str | None = None  # balanced | auto: a model's weights over all GPUs (device.device_map=)
    max_memory: Any = None  # of it: a size for every GPU, or {GPU: size} (device.max_memory=)
    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    technique: TechniqueConfig = field(default_factory=TechniqueConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    text_encode: TextEncodeConfig = field(default_factory=TextEncodeConfig)
    lowres: LowresConfig = field(default_factory=LowresConfig)
    guide: GuideConfig = field(default_factory=GuideConfig)
    denoise: DenoiseConfig = field(default_factory=DenoiseConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    stitch: StitchConfig = field(default_factory=StitchConfig)


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
    c = OmegaConf.to_container(config, resolve=False)
    assert isinstance(c, dict)
    native, factor = c["model"]["native_size"], c["model"]["vae_scale_factor"]
    denoise, decode, guide, lowres = c["denoise"], c["decode"], c["guide"], c["lowres"]
    token = factor * c["model"]["patch"]
    if lowres["width"] is None or lowres["height"] is None:
        size = lowres_size(c["width"], c["height"], native, c["model"]["size_multiple"], bool(c["regions"]))
        lowres["width"], lowres["height"] = lowres["width"] or size[0], lowres["height"] or size[1]
    guided = guide["mode"] != "none"
    if lowres["guidance_scale"] is None:
        lowres["guidance_scale"] = c["model"]["guidance_scale"]
    if denoise["guidance_scale"] is None:
        denoise["guidance_scale"] = c["model"]["tile_guidance_scale" if guided else "guidance_scale"]
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
    # 32 + 2*2 latents of tile and overlap and an 8-latent halo: the decoder sees 52x52 latents; in float32, with twice
    # the bytes, 44x44 (Stable Diffusion 1.5 then fits 800 MB on a processor without bf16 too: 750 MB for 840)
    if decode["tile_size"] is None and c["technique"]["vae_tiling"]:
        decode["tile_size"] = -(-max(c["width"], c["height"]) // factor) * factor
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
