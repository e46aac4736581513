"""The process that looks at the models before anything runs: ``python -m stages profile <run-dir>``.

Every model is built on the meta device and run once in the shapes of this run; no weight is read. Its result, a JSON
file, is all that the planner needs, for any budget.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from stages import phase_size
from stages.canvas.dilated import dilated_views
from stages.config import ConfigError, on_gpu
from stages.context import StageContext
from stages.files import write_json
from stages.memory.imports import light_imports
from stages.memory.layout import Layout, parkable, split_units
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.rows import BAND
from stages.memory.source import STAGING_BYTES
from stages.memory.trace import segments, trace
from stages.memory.trim import drop_clean_pages
from stages.models.checkpoint import Checkpoint, Component
from stages.models.loading import compute_dtype, open_checkpoint
from stages.models.schedulers import make_scheduler
from stages.models.sd import micro_batch
from stages.regions.config import from_config
from stages.sampling import denoise_canvas, lowres_canvas
from stages.tiles import Size, grid, latent_grid
from stages.vae.exact_vae import Direction, exact_cut, exact_disk_bytes
from stages.vae.open import DECODER, ENCODER
from stages.workflow.device import FLOPS

# RES that a stage's process grows by besides what is counted, measured: kernels' code, and oneDNN's primitives and
# buffers for every shape, which grow with the model up to about that of Stable Diffusion's VAE.
CODE, PRIMITIVES, FULL_SIZE = 34_000_000, 10_000_000, 80_000_000
TRANSFORMERS = 14_000_000  # what transformers' CLIP classes take more than diffusers' models, with all they touch
STAGE_SECONDS = 2.5  # to start a process and import


def import_diffusers() -> None:
    """What the stages with a denoiser or a VAE import."""
    with light_imports():
        from accelerate import init_empty_weights  # noqa: F401
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401


def run(context: StageContext) -> None:
    """Write ``profile.json``."""
    write_json(context.output / "profile.json", profile_run(context.config))


def flops_per_second(dtype: torch.dtype) -> float:
    """Of a 3x3 convolution as these models have them, measured in about a quarter of a second."""
    conv: Any = nn.Conv2d(320, 320, 3, padding=1, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last)
    image = torch.randn(2, 320, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    count, best = 2 * image.numel() * 320 * 9, 0.0
    with torch.inference_mode():
        end = time.monotonic() + 0.25
        while time.monotonic() < end:
            begin = time.monotonic()
            conv(image)
            best = max(best, count / (time.monotonic() - begin))
    return best * 0.6  # a whole model's share of its best layer


def cuts(
    component: Component,
    dtype: torch.dtype,
    call: Callable[[Any, int], Any],
    *,
    channels_last: bool,
    size: int = 0,
    drop: tuple[str, ...] = (),
    whole_stages: bool = False,
) -> tuple[int, list[dict[str, Any]]]:
    """(bytes of weights, the model cut at block level and at leaf level), each with its meta pass.

    ``call(model, samples)`` runs the model on ``samples`` samples; ``size`` is the micro-batch (0: the call's own).
    ``whole_stages``: small stages of a UNet are units, see ``split_units``.
    """
    model = component.build(optional=tuple(f"{name}." for name in drop))
    for name in drop:
        delattr(model, name)
    model = model.to(dtype)
    layout = Layout(model, dtype, channels_last=channels_last)
    found = []
    largest_leaf = max(unit.nbytes for unit in split_units(model, layout, 0))
    stage_limit = largest_leaf if whole_stages else 0
    for limit, parks in product((layout.nbytes, largest_leaf), (False, True)):
        units = split_units(model, layout, limit, stage_limit)
        parked = parkable(model, units) if parks and whole_stages else ()
        if parks and not parked:
            continue
        counts = (2, 3) if size else (1,)  # nothing grows with a group of one
        traces = [trace(model, units, lambda n=n: call(model, n * max(size, 1)), size, parked) for n in counts]
        lines = segments(traces[0], traces[-1])
        if not size:
            lines = [replace(line, slope=0) for line in lines]
        found.append(
            {
                "limit": limit,
                "stage_limit": stage_limit,
                "parked": list(parked),
                "parked_bytes": (traces[-1].parked - traces[0].parked) if parked else 0,
                "order": list(dict.fromkeys(name for name in traces[0].order)),
                "nbytes": {unit.name: unit.nbytes for unit in units},
                "flops": {unit.name: traces[0].flops_of(unit.name, counts[0]) for unit in units},
                "lines": [[line.unit, line.fixed, line.slope, line.workspace] for line in lines],
            }
        )
    for cut in found:  # units that the pass did not call (a tied or unused module) are read all the same
        cut["order"] += [name for name in cut["nbytes"] if name not in cut["order"]]
        cut["order"] = [name for name in cut["order"] if name in cut["nbytes"]]
    return layout.nbytes, found


def profile_run(config: DictConfig) -> dict[str, Any]:
    """{stage: the fields of ``planner.StageProfile``} for the stages of this run that open a model."""
    if on_gpu(config) and not torch.cuda.is_available():
        hint = "Use device=cpu, or a build of torch for this machine's GPU."
        raise ConfigError("device", config.device, "a GPU that torch can use", hint)
    dtype, last = compute_dtype(config), bool(config.technique.channels_last)
    import_diffusers()
    checkpoint = open_checkpoint(config, ("text_encoder", "tokenizer", "unet", "vae", "scheduler"), lambda _: None)
    # what a stage has at hand before the first weight; nothing has been computed yet
    held = (
        make_scheduler(checkpoint, config.scheduler.class_name, config.scheduler.options),
        checkpoint.component("unet").build(),
    )
    imports = own_peak_rss()
    drop_clean_pages()
    base = usage(os.getpid()).rss
    del held
    rate = FLOPS if on_gpu(config) else flops_per_second(dtype)
    with light_imports("transformers"):  # passes on meta too would import the graph compiler
        profiles = {
            "text_encode": {**_text(config, checkpoint, dtype), "base": base + TRANSFORMERS},
            **{name: {**found, "base": base} for name, found in _denoisers(config, checkpoint, dtype, last).items()},
            **{name: {**found, "base": base} for name, found in _vaes(config, checkpoint, dtype, last).items()},
        }
    for name, profile in profiles.items():
        profile |= {"name": name, "rate": rate, "seconds": STAGE_SECONDS, "imports": imports}
        profile["base"] += staging(profile["cuts"][-1]["nbytes"].values())
        if name != "text_encode":
            profile["base"] += touched(profile["weights"])
    return profiles


def touched(weights: int) -> int:
    """Bytes that a process grows by when a model of ``weights`` bytes has run once in all its shapes."""
    return CODE + int(PRIMITIVES * min(1.0, weights / FULL_SIZE))


def staging(units: Iterable[int]) -> int:
    """Bytes of the buffer that raw weights are converted from, as far as the largest unit fills it."""
    return min(STAGING_BYTES, max(units))


def _text(config: DictConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    component = checkpoint.component("text_encoder")
    rows = 2  # a prompt and its negative at a time, whatever the number of regions
    length = component.config.get("max_position_embeddings", 77)

    def call(model: nn.Module, samples: int) -> Any:
        return model(torch.zeros((rows * samples, length), dtype=torch.long, device="meta"))

    weights, found = cuts(component, dtype, call, channels_last=False)
    count = len(from_config(config).texts)
    return {"extra": 0, "weights": weights, "micro_batch": rows, "micro_batches": count, "steps": 1, "cuts": found}


def _denoisers(config: DictConfig, checkpoint: Checkpoint, dtype: torch.dtype, last: bool) -> dict[str, dict[str, Any]]:
    component = checkpoint.component("unet")
    steps = config.denoise.num_inference_steps
    running = steps if config.guide.mode == "none" else int(steps * config.denoise.strength)
    jobs = {
        "lowres": (lowres_canvas, config.lowres.num_inference_steps),
        "denoise": (denoise_canvas, running),
    }
    if config.guide.mode == "none" or config.guide.image:
        del jobs["lowres"]
    found: dict[str, dict[str, Any]] = {}
    passes: dict[tuple[int, int], tuple[int, list[dict[str, Any]]]] = {}
    for name, (canvas_of, count) in jobs.items():
        canvas, views, _ = canvas_of(config)
        band = config.model.latent_channels * max(1, min(BAND // canvas.width, canvas.height)) * canvas.width * 4
        tiles = config.model.latent_channels * views[0].tile.size.height * canvas.width * 4
        height, width = views[0].tile.size
        size = micro_batch(component.config, height, width, config.device)
        channels, context = component.config["in_channels"], component.config["cross_attention_dim"]

        def call(model: nn.Module, samples: int, shape=(channels, height, width), context=context) -> Any:
            image = torch.empty((samples, *shape), dtype=dtype, device="meta")
            image = image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            embeds = torch.empty((samples, 77, context), dtype=dtype, device="meta")
            return model(image, torch.empty((), device="meta"), encoder_hidden_states=embeds, return_dict=False)

        if (height, width) not in passes:  # the low-res picture is often as large as a tile
            passes[height, width] = cuts(
                component, dtype, call, channels_last=last, size=size, whole_stages=on_gpu(config)
            )
        weights, cut = passes[height, width]
        # views with and without guidance do not share a micro-batch
        samples = [sum(view.passes for view in views if view.passes == guided) for guided in (1, 2)]
        more = dilated_views(config)[2] if name == "denoise" else []
        samples += [sum(view.passes for view in more if view.passes == guided) for guided in (1, 2)]
        blurred = 4 * band if more else 0  # twice, with padding
        found[name] = {
            # a band of the canvas, its noise, guide, prediction, the scheduler's history and temporaries; and the rows
            # of latents and predictions that the tiles of the moment lie in
            "extra": blurred + 12 * band + 2 * tiles,
            "weights": weights,
            "micro_batch": size,
            "micro_batches": sum(-(-number // size) for number in samples),
            "steps": count,
            "cuts": cut,
        }
    return found


def _vaes(config: DictConfig, checkpoint: Checkpoint, dtype: torch.dtype, last: bool) -> dict[str, dict[str, Any]]:
    from stages.picture.opening import opening_bytes
    from stages.vae.tiled import HALO

    component, f = checkpoint.component("vae"), config.model.vae_scale_factor

    def image(channels: int, height: int, width: int) -> torch.Tensor:
        made = torch.empty((1, channels, height, width), dtype=dtype, device="meta")
        return made.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def decode(height: int, width: int) -> Callable[[Any, int], Any]:
        return lambda model, _: model.decode(image(config.model.latent_channels, height, width), return_dict=False)

    def encode(height: int, width: int) -> Callable[[Any, int], Any]:
        return lambda model, _: model.encode(image(3, height, width), return_dict=False)

    found: dict[str, dict[str, Any]] = {}
    single = {"micro_batch": 1, "steps": 1}
    if config.decode.mode == "exact":
        size = Size(config.height // f, config.width // f)
        found["decode"] = {**single, "extra": 0, "micro_batches": 1, **_exact(component, dtype, "decode", size)}
    else:
        tiles = latent_grid(config.width, config.height, config.decode.tile_size, config.decode.overlap, f)
        side = (config.decode.tile_size + 2 * config.decode.halo) // f
        height, width = min(side, config.height // f), min(side, config.width // f)
        weights, cut = cuts(component, dtype, decode(height, width), channels_last=last, drop=ENCODER)
        rows = height * (config.width // f) * config.model.latent_channels * 4  # of latents that are in memory
        if config.decode.mode == "shared":
            rows += _keys(component, dtype, height * width)
        found["decode"] = {**single, "extra": rows, "weights": weights, "micro_batches": len(tiles) + 1, "cuts": cut}
    if config.guide.mode == "none":
        return found
    side = config.guide.tile_size // f + 2 * HALO
    count = len(grid(Size(config.height // f, config.width // f), Size(*[config.guide.tile_size // f] * 2), 4)) + 1
    halves, passes, disk = [], [], 0
    if config.guide.vae_mode == "exact":
        canvases: list[tuple[Direction, tuple[int, int]]] = []
        if config.guide.image or config.guide.upscale == "lanczos":
            canvases.append(("encode", (config.width, config.height)))
        if not config.guide.image:
            canvases.append(("decode", _source_size(config)))
        for direction, (width, height) in canvases:
            made = _exact(component, dtype, direction, Size(height // f, width // f))
            halves.append((made["weights"], made["cuts"]))
            passes.append(count := 1)
            disk = max(disk, made["disk"])
    elif config.guide.image or config.guide.upscale == "lanczos":
        height, width = min(side, config.height // f) * f, min(side, config.width // f) * f
        halves.append(cuts(component, dtype, encode(height, width), channels_last=last, drop=DECODER))
        passes.append(count)
    if not config.guide.image and config.guide.vae_mode != "exact":
        height, width = (min(side, length // f) for length in reversed(_source_size(config)))
        halves.append(cuts(component, dtype, decode(height, width), channels_last=last, drop=ENCODER))
        passes.append(max(1, math.prod(_source_size(config)) // (height * width * f * f)))
    keys = _keys(component, dtype, side * side) if config.guide.vae_mode == "shared" else 0
    opened = opening_bytes(Path(config.guide.image)) if config.guide.image else 0
    found["guide"] = {
        **single,
        # the user's picture is opened before the model is
        "extra": max(_guide_bytes(config) + keys, opened - sum(half[0] for half in halves)),
        "weights": sum(half[0] for half in halves),
        "micro_batches": count,
        "cuts": _joined([half[1] for half in halves], [number / count for number in passes]),
        "disk": disk,
    }
    return found


def _keys(component: Component, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values that the tiles of ``shared`` attend to."""
    return 2 * tokens * component.config["block_out_channels"][-1] * dtype.itemsize


def _exact(component: Component, dtype: torch.dtype, direction: Direction, size: Size) -> dict[str, Any]:
    """``weights``, ``cuts`` and ``disk`` (bytes of scratch space) of an exact pass."""
    drop = ENCODER if direction == "decode" else DECODER
    model = component.build(optional=tuple(f"{name}." for name in drop))
    for name in drop:
        delattr(model, name)
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    disk = exact_disk_bytes(model, direction, size, dtype.itemsize)
    return {"weights": weights, "cuts": [exact_cut(model, direction, size, dtype.itemsize)], "disk": disk}


def _source_size(config: DictConfig) -> tuple[int, int]:
    """(width, height) of the picture that the last guide enlarges."""
    if config.guide.phases:
        return phase_size(config.width, config.height, config.guide.phases[-1], config.model.vae_scale_factor)
    return config.lowres.width, config.lowres.height


def _guide_bytes(config: DictConfig) -> int:
    """What the guide holds besides the model: rows of the picture that it enlarges and of the canvas' latents."""
    f, (width, height) = config.model.vae_scale_factor, _source_size(config)
    tile = config.guide.tile_size
    blend = min(tile, height) * width * 3 * 4  # a row of tiles, as floats
    shrunk = height * (tile + 16 * f) * 3 * 3  # the whole picture narrowed, and Pillow's copy of it
    crop = (tile + 16 * f) * height // config.height + 8  # rows of the picture that one row of crops is cut from
    latents = min(tile, config.height) // f * (config.width // f) * config.model.latent_channels * 4
    return max(blend, shrunk, 2 * latents + crop * width * 3)


def _joined(halves: list[list[dict[str, Any]]], shares: list[float]) -> list[dict[str, Any]]:
    """Two halves of a VAE that are in one model: the order of the first, then of the second.

    ``shares``: how many of the micro-batches that are counted a half sees.
    """
    joined = []
    for parts in zip(*halves, strict=True):
        joined.append(
            {
                "limit": max(part["limit"] for part in parts),
                "order": [name for part in parts for name in part["order"]],
                "nbytes": {k: v for part in parts for k, v in part["nbytes"].items()},
                "flops": {
                    k: int(v * share)
                    for part, share in zip(parts, shares, strict=True)
                    for k, v in part["flops"].items()
                },
                "lines": [line for part in parts for line in part["lines"]],
            }
        )
    return joined
