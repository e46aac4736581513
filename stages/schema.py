"""Every key of the configuration: its type and its default. None is derived from the others (:mod:`stages.config`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(kw_only=True)
class ModelConfig:
    """Which checkpoint, and what cannot be read from it."""

    name: str = MISSING
    family: str = MISSING  # sd
    path: str = MISSING  # diffusers folder, hub id, or a single .safetensors file
    denoiser: str | None = None  # a .safetensors or .gguf file whose UNet or transformer takes the place of path's
    vae: str | None = None  # a folder or a .safetensors file with an AutoencoderKL in the place of path's
    revision: str | None = None  # of a hub id
    config: str | None = None  # of a single file: a diffusers folder with configs, tokenizer, and what the file lacks
    loras: Any = field(default_factory=list)  # adapters: [{path: FILE, scale: 1.0}, FILE, FILE:0.8], in order
    controlnets: Any = field(default_factory=list)  # [{path: PATH, image: FILE or guide: true, scale, start, end}]
    embeddings: list[str] = field(default_factory=list)  # files of textual inversion: words for prompts
    lora_dir: str | None = None  # where <lora:NAME:0.8> in a prompt finds NAME.safetensors, in any folder below
    prediction_type: str | None = None  # epsilon | v_prediction; None: as the checkpoint's scheduler config says
    text_tokens: int | None = None  # of a text at most, for families that do not pad them; None: by its bytes
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
    num_inference_steps: int = 25  # default of lowres.num_inference_steps
    tile_num_inference_steps: int = 20  # default of denoise.num_inference_steps
    blend: str = "gaussian"  # default of denoise.blend


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
class LinfusionConfig:
    """LinFusion: self-attention of UNets that is linear in the number of tokens."""

    path: str | None = None  # folder with config.json and its weights; None: off
    scope: str = "tile"  # tile | canvas: what a tile attends to, itself or all of the canvas


@dataclass(kw_only=True)
class StepCacheConfig:
    """What the deep layers of a UNet give, used again."""

    interval: int | None = 1  # steps that use what the first of them computed; 1 or null: off
    depth: int = 0  # the skip connection below which layers are deep; 0: the first, fastest


@dataclass(kw_only=True)
class TechniqueConfig:
    """Numeric switches that can be compared."""

    dtype: str = "auto"  # auto | fp32 | bf16 | fp16 (or float32 | bfloat16 | float16): of the computation
    component_dtype: dict[str, str] = field(default_factory=dict)  # of one component: technique.dtype.vae=fp32
    channels_last: bool = True
    tf32: bool = False
    attention: str = "auto"  # auto | sdpa | math | sliced | xformers | openvino, or a name of diffusers' dispatcher
    offload: str = "stream"  # stream | none | model | sequential | group: how weights come to where they are used
    group_offload: GroupOffloadConfig = field(default_factory=GroupOffloadConfig)
    tome: TomeConfig = field(default_factory=TomeConfig)
    linfusion: LinfusionConfig = field(default_factory=LinfusionConfig)
    step_cache: StepCacheConfig = field(default_factory=StepCacheConfig)
    vae_tiling: bool = False  # diffusers' own tiles, of the whole canvas, with decode.mode=independent
    vae_slicing: bool = False
    quantize: str = "none"  # none | int8 (weights and samples) | int8_weights: the denoiser's layers, on a CPU
    compile: str = "none"  # none | compile (torch.compile) | trace (torch.jit.trace), with offload=none


@dataclass(kw_only=True)
class LaunchConfig:
    """How stage processes are started and watched."""

    fork: str = "auto"  # auto | on | off: stages from one warm process where the budget has room; the same picture
    threads: int | None = None  # torch threads; None: all cores, on a GPU 8 at most
    sample_seconds: float = 0.02  # memory sampling period
    total_budget: str | None = None  # of all runs at once on this machine, with the same output_dir: one waits for room
    nproc: int = 1  # ranks of a stage that share its tiles, each with a GPU of its own and memory.budget for itself
    nnodes: int = 1  # hosts that share a picture's tiles, each with nproc ranks and the same folders
    node_rank: int = 0  # which of them this one is; the first (0) keeps the run
    rdzv_endpoint: str | None = None  # HOST:PORT of the first one, where all ranks meet
    backend: str = "auto"  # auto | gloo | nccl: how they talk; auto: gloo on the CPU, nccl on GPUs
    timeout: float = 1800.0  # seconds that one waits for another


@dataclass(kw_only=True)
class TextEncodeConfig:
    """Prompt to embeddings."""

    clip_skip: int | None = None  # as in diffusers: layers skipped from the end


@dataclass(kw_only=True)
class LowresConfig:
    """The low-resolution picture that guides the canvas."""

    num_inference_steps: int | None = None  # derived: model.num_inference_steps
    guidance_scale: float | None = None  # derived: model.guidance_scale
    width: int | None = None  # derived: the canvas' shape at the native area
    height: int | None = None


@dataclass(kw_only=True)
class GuideConfig:
    """How the low-res picture (or the user's own) guides the canvas."""

    mode: str = "sdedit"
    image: str | None = None
    fit: str = "crop"  # crop | stretch: an image of another shape than the canvas
    upscale: str = "lanczos"  # lanczos | latent | a .safetensors file of a trained upscaler
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

    num_inference_steps: int | None = None  # derived: model.tile_num_inference_steps
    guidance_scale: float | None = None  # derived: model.tile_guidance_scale; without a guide model.guidance_scale
    strength: float | None = None  # derived: model.strength
    tile_size: int | None = None  # pixels; derived: native size
    overlap: int | None = None  # pixels; derived: a quarter of the tile
    blend: str | None = None  # derived: model.blend
    dilated: DilatedConfig = field(default_factory=DilatedConfig)


@dataclass(kw_only=True)
class DecodeConfig:
    """Latents to pixels, tile by tile."""

    mode: str = "shared"  # independent | shared | exact | taesd (a draft, by model.preview_vae)
    tile_size: int | None = None  # pixels of a decoded tile without its halo; derived
    overlap: int | None = None  # pixels that neighbours share and stitch blends; derived
    halo: int | None = None  # pixels of context decoded around a tile and thrown away; derived


@dataclass(kw_only=True)
class StitchConfig:
    """Pixel tiles to one file."""

    format: str = "png"  # png | tiff | deepzoom: what is written beside image.png
    compression: int = 6  # zlib level of the PNG


@dataclass(kw_only=True)
class WildcardsConfig:
    """What the lines of ``prompts_file`` leave open: ``{a|b}``, ``__name__``."""

    dir: str | None = None  # where __name__ finds name.txt; None: "wildcards" beside the file
    seed: int = 0  # of what is drawn; a sweep that goes on draws the same
    draws: int = 1  # of each line that leaves something open


@dataclass(kw_only=True)
class PreviewConfig:
    """Small pictures of how it comes out, in the report: of every N-th step (0: none). No result hangs on them."""

    lowres: int = 1  # lowres.preview_every=
    denoise: int = 1  # denoise.preview_every=
    vae: str | None = None  # model.preview_vae=: folder of an AutoencoderTiny (TAESD); None: linear in the latents


@dataclass(kw_only=True)
class ServeConfig:
    """``stage=serve``: the runs of output_dir in a browser of this machine."""

    port: int = 8000  # 0: any that is free


@dataclass(kw_only=True)
class StoreConfig:
    """The store of results, ``<output_dir>/.store``."""

    max_size: str | None = None  # after a run the oldest results go that no run links to; None: no limit


@dataclass(kw_only=True)
class Config:
    """Everything a run is made from."""

    prompt: str | None = None  # required; the empty text is a prompt too
    negative_prompt: str = ""
    prompt_file: str | None = None
    prompts_file: str | None = None  # with -m: a run for every line, PROMPT or PROMPT -- NEGATIVE
    from_image: str | None = None  # a picture: its settings are the base of this run
    prompt_line: str | None = None  # such a line
    wildcards: WildcardsConfig = field(default_factory=WildcardsConfig)
    prompt_weighting: str = "auto"  # auto: (word:1.2), [word], BREAK, AND, prompts of any length, for CLIP | off
    width: int = 2048
    height: int = 2048
    seed: int = 0
    run: str | None = None  # folder under output_dir; derived from prompt and parameters
    stage: Any = "all"  # all | plan | NAME | [NAME, NAME], or list | gc | export | serve
    keep: Any = "7d"  # stage=gc: results that no run links to stay as long
    dry: bool = False  # stage=gc only says what it would do
    to: str | None = None  # stage=export: the new folder
    store: StoreConfig = field(default_factory=StoreConfig)
    force: bool = False
    progress: bool = True
    output_dir: str = "outputs"
    score: str | None = None  # seconds | peak | seams | module:function: what a sweeper that optimises is told
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
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
