"""Everything that can be known to be wrong is refused here, before any process starts: key, got, allowed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages import multiple
from stages.config import (
    BACKENDS,
    BLENDS,
    DECODE_MODES,
    DTYPES,
    GUIDE_MODES,
    VAE_MODES,
    WEIGHTS,
    ConfigError,
    close_match,
    dtype_of_component,
    max_memory,
    on_gpu,
    parse_bytes,
)
from stages.families.facts import facts_of, running_steps
from stages.files import read_object
from stages.hashes import is_remembered
from stages.models.locate import CheckpointError, lone_weights
from stages.paths import PICKLES, is_safetensors
from stages.techniques import TECHNIQUES
from stages.workflow import forking
from stages.workflow.keys import CONF, check_output_dir, check_run_name

LARGEST = 65536  # pixels a side
LEAST_BUDGET = 280_000_000  # bytes: python, torch and a model class, before the first weight


def _at_least(config: DictConfig, key: str, least: float) -> Any:
    value = OmegaConf.select(config, key)
    if value is None or value < least:
        raise ConfigError(key, value, f"{least} or more")
    return value


def _one_of(config: DictConfig, key: str, allowed: Iterable[str]) -> None:
    value, allowed = str(OmegaConf.select(config, key)), list(allowed)
    if value not in allowed:
        raise ConfigError(key, value, f"one of {', '.join(allowed)}", close_match(value, allowed))


def check_sizes(config: DictConfig) -> None:
    """What ``resolve`` computes with has to be sound before it computes."""
    for key in ("width", "height", "model.native_size", "model.vae_scale_factor", "model.patch", "model.size_multiple"):
        _at_least(config, key, 1)
    for key in ("denoise.tile_size", "decode.tile_size"):
        if OmegaConf.select(config, key) is not None:
            _at_least(config, key, 1)


def _check_phases(config: DictConfig) -> None:
    sides, longest = config.guide.phases, max(config.width, config.height)
    expected = f"a list of growing numbers of pixels, multiples of {multiple(config)}, under {longest}"
    plain = OmegaConf.to_container(sides) if OmegaConf.is_config(sides) else sides
    if not isinstance(plain, list) or not all(isinstance(side, int) for side in plain):
        raise ConfigError("guide.phases", plain, expected)
    grows = all(a < b for a, b in zip(plain, [*plain[1:], longest], strict=True)) if plain else True
    if not grows or any(side < 1 or side % multiple(config) for side in plain):
        raise ConfigError("guide.phases", plain, expected)


def validate(config: DictConfig) -> None:
    """Check a resolved config.

    Raises:
        ConfigError: the first value that cannot work.
    """
    if config.run is not None:
        check_run_name(str(config.run))
    _geometry(config)
    _numbers(config)
    _one_of(config, "denoise.blend", BLENDS)
    _one_of(config, "guide.mode", GUIDE_MODES)
    _one_of(config, "prompt_weighting", ("auto", "off"))
    _upscale(config)
    _one_of(config, "guide.vae_mode", VAE_MODES)
    _one_of(config, "guide.fit", ("crop", "stretch"))
    _one_of(config, "decode.mode", DECODE_MODES)
    _one_of(config, "technique.dtype", DTYPES)
    _one_of(config, "memory.enforce", ("auto", "cgroup", "watchdog", "off"))
    _one_of(config, "memory.host", ("pinned", "disk"))
    _one_of(config, "memory.weights", WEIGHTS)
    _one_of(config, "stitch.format", ("png", "tiff", "deepzoom"))
    _one_of(config, "launch.backend", BACKENDS)
    device, _, index = str(config.device).partition(":")
    if device not in ("cpu", "cuda") or not (index or "0").isdigit():
        raise ConfigError("device", config.device, "cpu or cuda", close_match(device, ["cpu", "cuda"]))
    for key in ("nproc", "nnodes"):
        if (count := config.launch[key]) > 1 and index:
            hint = "Which GPUs there are is said by CUDA_VISIBLE_DEVICES."
            raise ConfigError(f"launch.{key}", count, f"1 with device={config.device}", hint)
    _nodes(config)
    forking.check(config)
    _device_map(config)
    if config.launch.backend == "nccl" and device == "cpu":
        raise ConfigError("launch.backend", "nccl", "auto or gloo on the CPU")
    _family(config)
    _scheduler(config)
    _memory(config)
    _dtypes(config)
    for technique in TECHNIQUES:
        technique.check(config)
    _files(config)


def _upscale(config: DictConfig) -> None:
    """A way of resampling, or the file of a trained upscaler."""
    given, ways = str(config.guide.upscale), ("lanczos", "latent")
    if given in ways:
        return
    expected = f"{', '.join(ways)} or a .safetensors file of an upscaler"
    if not is_safetensors(given):
        pickle = given.lower().endswith(PICKLES)
        hint = "Unpickling runs code from the file: take its .safetensors file." if pickle else close_match(given, ways)
        raise ConfigError("guide.upscale", given, expected, hint)
    if not Path(given).is_file():
        raise ConfigError("guide.upscale", given, expected, "A relative path starts in the current folder.")
    if find_spec("spandrel") is None:
        hint = 'pip install "highres-lowram[upscale]", or pip install spandrel'
        raise ConfigError("guide.upscale", given, "lanczos or latent without the package spandrel", hint)


def _nodes(config: DictConfig) -> None:
    """Hosts know each other, and which one they are."""
    nodes, node, endpoint = (config.launch[key] for key in ("nnodes", "node_rank", "rdzv_endpoint"))
    if not 0 <= node < nodes:
        raise ConfigError("launch.node_rank", node, f"0 to {nodes - 1}, with launch.nnodes={nodes}")
    if nodes == 1:
        return
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        hint = "The name and a free port of the host with launch.node_rank=0, the same on all."
        raise ConfigError("launch.rdzv_endpoint", endpoint, f"HOST:PORT with launch.nnodes={nodes}", hint)
    if config.force:
        hint = "Hosts see by its results what a run has done: take another run=NAME."
        raise ConfigError("force", True, f"false with launch.nnodes={nodes}", hint)


def _device_map(config: DictConfig) -> None:
    way, key = config.device_map, "device.device_map"
    limits = max_memory(config)
    if way is None:
        if limits is not None:
            hint = "memory.device_budget is that of one GPU."
            raise ConfigError("device.max_memory", config.max_memory, f"nothing without {key}", hint)
        return
    if way not in ("balanced", "auto"):
        raise ConfigError(key, way, "balanced or auto", close_match(way, ["balanced", "auto"]))
    if config.device != "cuda":
        raise ConfigError(key, way, f"nothing with device={config.device}: it spreads weights over GPUs", "device=cuda")
    for other, fine, why in (
        *((f"launch.{key}", 1, "A rank has one GPU, with the whole model.") for key in ("nproc", "nnodes")),
        ("memory.device_budget", None, "device.max_memory says what each GPU may take."),
        ("technique.offload", "stream", "All weights stay on the GPUs."),
    ):
        if (value := OmegaConf.select(config, other)) != fine:
            raise ConfigError(other, value, f"{fine} with {key}={way}", why)
    if config.memory.weights == "streamed":
        raise ConfigError("memory.weights", "streamed", f"auto with {key}={way}", "All weights stay on the GPUs.")
    for other in ("decode.mode", "guide.vae_mode"):
        if OmegaConf.select(config, other) == "exact":
            raise ConfigError(other, "exact", f"shared or independent with {key}={way}")


def _geometry(config: DictConfig) -> None:
    factor, token = config.model.vae_scale_factor, multiple(config)
    for key in ("width", "height", "lowres.width", "lowres.height", "model.native_size"):
        size = _at_least(config, key, token)
        if size > LARGEST:
            raise ConfigError(key, size, f"at most {LARGEST} pixels")
        if size % token:
            below = size // token * token
            raise ConfigError(key, size, f"a multiple of {token}", f"The nearest are {below} and {below + token}.")
    for key in ("denoise.tile_size", "denoise.overlap", "decode.tile_size", "decode.overlap", "decode.halo"):
        size = _at_least(config, key, factor if key.endswith("tile_size") else 0)
        if key.startswith("denoise") and size % token:
            raise ConfigError(key, size, f"a multiple of {token} pixels, a token of the denoiser")
        if size % factor:
            raise ConfigError(key, size, f"a multiple of {factor} pixels, the VAE's factor")
    for node in ("denoise", "decode"):
        overlap, tile = config[node].overlap, config[node].tile_size
        if overlap >= tile:
            raise ConfigError(f"{node}.overlap", overlap, f"less than {node}.tile_size ({tile})")
    if _at_least(config, "guide.tile_size", factor) % factor:
        raise ConfigError("guide.tile_size", config.guide.tile_size, f"a multiple of {factor} pixels")


def _numbers(config: DictConfig) -> None:
    if not 0 <= config.seed < 2**64:
        raise ConfigError("seed", config.seed, "0 to 2**64 - 1")
    for key in ("lowres.num_inference_steps", "denoise.num_inference_steps"):
        if not 1 <= OmegaConf.select(config, key) <= 1000:
            raise ConfigError(key, OmegaConf.select(config, key), "1 to 1000 steps")
    _check_phases(config)
    if not 0 < config.denoise.strength <= 1:
        raise ConfigError("denoise.strength", config.denoise.strength, "more than 0, at most 1")
    if config.guide.mode != "none" and running_steps(config) < 1:
        least = (
            f"at least {1 / config.denoise.num_inference_steps:.3g}: one of {config.denoise.num_inference_steps} steps"
        )
        raise ConfigError("denoise.strength", config.denoise.strength, least)
    for key in ("lowres.guidance_scale", "denoise.guidance_scale"):
        if not 0 <= OmegaConf.select(config, key) <= 100:
            raise ConfigError(key, OmegaConf.select(config, key), "0 to 100 (1: no unconditional pass)")
    if not 0 <= config.guide.hold_steps <= 1:
        raise ConfigError("guide.hold_steps", config.guide.hold_steps, "a share of the steps, 0 to 1")
    if not 0 < config.guide.skip_residual_power <= 100:
        raise ConfigError("guide.skip_residual_power", config.guide.skip_residual_power, "more than 0, at most 100")
    for name in ("cosine_scale", "sigma", "sigma_scale"):
        if not 0 < config.denoise.dilated[name] <= 100:
            raise ConfigError(f"denoise.dilated.{name}", config.denoise.dilated[name], "more than 0, at most 100")
    if config.text_encode.clip_skip is not None:
        _at_least(config, "text_encode.clip_skip", 0)
    if not 0 <= config.stitch.compression <= 9:
        raise ConfigError("stitch.compression", config.stitch.compression, "a zlib level, 0 to 9")
    if config.launch.threads is not None:
        _at_least(config, "launch.threads", 1)
    _at_least(config, "preview.lowres", 0)
    _at_least(config, "preview.denoise", 0)
    _at_least(config, "launch.nproc", 1)
    _at_least(config, "launch.nnodes", 1)
    _at_least(config, "launch.timeout", 1)
    if not 0.001 <= config.launch.sample_seconds <= 10:
        raise ConfigError("launch.sample_seconds", config.launch.sample_seconds, "0.001 to 10 seconds")


def _family(config: DictConfig) -> None:
    facts = facts_of(config)
    if config.model.vae is not None and facts.vae != "AutoencoderKL":
        raise ConfigError("model.vae", config.model.vae, f"nothing: this model has an {facts.vae} of its own")
    for key in ("latent_channels", "vae_scale_factor", "patch"):
        if key == "latent_channels" and facts.unet:
            continue  # the checkpoint's VAE says so, where one was found
        if config.model[key] != getattr(facts, key):
            expected = f"{getattr(facts, key)}, as the family {config.model.family} has it"
            raise ConfigError(f"model.{key}", config.model[key], expected)


def _scheduler(config: DictConfig) -> None:
    if config.model.prediction_type is not None:
        _one_of(config, "model.prediction_type", ("epsilon", "v_prediction", "sample", "flow_prediction"))
    name = config.scheduler.class_name
    if name is not None and facts_of(config).flow and not name.startswith("FlowMatch"):
        hint = "Use scheduler=checkpoint."
        raise ConfigError("scheduler.class_name", name, "a scheduler for flow matching, FlowMatch...", hint)
    if name is not None and not (name.isidentifier() and name.endswith("Scheduler")):
        options = ", ".join(sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml")))
        raise ConfigError("scheduler.class_name", name, "a scheduler class of diffusers", f"Or scheduler={options}")


def _dtypes(config: DictConfig) -> None:
    halves = [name for name in facts_of(config).opened if dtype_of_component(config, name) == "fp16"]
    if halves and not on_gpu(config):
        hint = "Processors have no fp16 products: it would be emulated, many times slower. technique.dtype=auto"
        raise ConfigError("technique.dtype", "fp16", f"fp32 or bf16 on a CPU ({', '.join(halves)})", hint)


def _memory(config: DictConfig) -> None:
    budget = parse_bytes(config.memory.budget)
    if budget < LEAST_BUDGET:
        hint = "Python with torch and an empty model take that much before the first weight is read."
        raise ConfigError("memory.budget", config.memory.budget, f"at least {LEAST_BUDGET // 10**6}MB", hint)
    if config.memory.device_budget is not None:
        parse_bytes(config.memory.device_budget, "memory.device_budget")
    if config.store.max_size is not None:
        parse_bytes(config.store.max_size, "store.max_size")


def _preview_vae(config: DictConfig) -> None:
    """One that decodes this model's latents, with weights that need not be unpickled."""
    if (folder := config.preview.vae) is None:
        if config.decode.mode == "taesd":
            hint = "It is the tiny VAE (TAESD) of this model's latents that drafts are decoded by."
            raise ConfigError("model.preview_vae", None, "a folder with decode.mode=taesd", hint)
        return
    known = read_object(Path(folder) / "config.json")
    got = known.get("_class_name"), known.get("latent_channels", 4)
    expected = f"a folder with an AutoencoderTiny of {config.model.latent_channels} channels (TAESD)"
    if got != ("AutoencoderTiny", config.model.latent_channels):
        found = f"{got[0]} of {got[1]} channels" if known else "no config.json"
        raise ConfigError("model.preview_vae", f"{folder}: {found}", expected)
    try:
        lone_weights(Path(folder))
    except CheckpointError as error:
        raise ConfigError("model.preview_vae", str(error), expected) from None


def _files(config: DictConfig) -> None:
    _preview_vae(config)
    if config.guide.image is not None:
        image = Path(config.guide.image)
        gone = not image.exists() and is_remembered(image, Path(config.output_dir) / ".store" / ".identity")
        if not gone and not (image.is_file() and os.access(image, os.R_OK)):  # one that is gone is in its guide
            raise ConfigError(
                "guide.image", str(image), "a picture that can be read", "A relative path starts in the current folder."
            )
    check_output_dir(Path(config.output_dir))
