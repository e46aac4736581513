"""The process that looks at the models before anything runs: ``python -m stages profile <run-dir>``.

Every model is built on the meta device and run once in the shapes of this run; no weight is read. Its result, a JSON
file, is all that the planner needs, for any budget. What a stage opens is said by the ``look`` beside its ``run``.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from stages.config import ConfigError, max_memory, on_gpu
from stages.context import StageContext
from stages.families.facts import Facts, facts_of
from stages.families.looking import Looking
from stages.families.opening import open_checkpoint
from stages.families.schedules import make_scheduler
from stages.files import write_json
from stages.memory.imports import light_imports
from stages.memory.monitor import own_peak_rss, usage
from stages.memory.planner import ModelProfile, StageProfile
from stages.memory.source import STAGING_BYTES
from stages.memory.trim import drop_clean_pages
from stages.models.placement import bytes_by_gpu, caps, placed
from stages.models.tiny_vae import TINY
from stages.models.upscaler import COMPONENT
from stages.regions.types import Regions
from stages.rehearsal import rehearse, spell
from stages.techniques.dtype import dtype_of
from stages.workflow.device import FLOPS, LIBRARIES, on_device
from stages.workflow.graph import active

# RES that a stage's process grows by besides what is counted, measured: kernels' code (of a UNet more: attention beside
# convolutions); oneDNN's primitives and buffers for every shape, and pieces of memory that are kept while a
# unit computes (``memory/trim.py``; a VAE's rolling passes keep none). The latter two grow with the model up to about
# that of Stable Diffusion's VAE. Pieces of a UNet's many sizes come to lie ever farther apart: in one step they take as
# much as any model's, in sixteen passes what is said here (``python -m benchmarks engines``).
CODE, UNET_CODE, PRIMITIVES, FULL_SIZE = 30_000_000, 44_000_000, 10_000_000, 80_000_000
PIECES, UNET_PIECES = 8_000_000, 24_000_000
BF16_CODE = 2_000_000  # a UNet's more in bf16, which asks oneDNN for kernels of its own (``stages/blocked.py``)
# What a model leaves in the process to one that opens after it, measured: RES before the weights of SDXL's second text
# encoder less that before the first one's (``python -m stages text_encode``: 8.6 MB in bf16, 10.9 in float32).
LEFT = 10_000_000
STAGE_SECONDS = 2.5  # to start a process and import


def run(context: StageContext) -> None:
    """Write ``profile.json``."""
    found = profile_run(context.config, context.regions, context.progress.note)
    write_json(context.output / "profile.json", {name: stage.as_json() for name, stage in found.items()})


def profile_run(
    config: DictConfig, regions: Regions, note: Callable[[str], None] = lambda text: None
) -> dict[str, StageProfile]:
    """A profile of every stage of this run that opens a model."""
    if on_gpu(config) and not torch.cuda.is_available():
        hint = "Use device=cpu, or a build of torch for this machine's GPU."
        raise ConfigError("device", config.device, "a GPU that torch can use", hint)
    stages = {stage.module: importlib.import_module(f"stages.{stage.module}") for stage in active(config)}
    imports, base, looking = process(config, regions, note)
    facts = looking.family.facts
    rate = FLOPS if on_gpu(config) else flops_per_second(dtype_of(config, facts.denoiser))
    found = {}
    with light_imports("transformers"):  # passes on meta too would import the graph compiler
        for name, module in stages.items():
            if not hasattr(module, "look"):
                continue
            look = module.look(looking)
            if not look.models:
                continue
            found[name] = StageProfile(
                name=name,
                base=base
                + max(map(staging, look.models))
                + left(look.models)
                + max(touched(model, facts, dtype_of(config, model.component), look.code) for model in look.models),
                imports=max(imports, base + look.before),
                extra=look.extra,
                models=tuple(over_gpus(looking, name, model) for model in look.models),
                rate=rate,
                seconds=STAGE_SECONDS,
                disk=look.disk,
            )
    spell(config, looking.checkpoint)  # their library has no part in what a stage takes that opens another model
    return found


def over_gpus(looking: Looking, stage: str, model: ModelProfile) -> ModelProfile:
    """With the places of its weights, where they are spread over several GPUs; a VAE is small and stays on one."""
    way = looking.config.device_map
    if way is None or model.component in (COMPONENT, TINY):  # they are small
        return model
    limits = caps(max_memory(looking.config))
    room = LIBRARIES + on_device(model.cuts[0]).peak(model.together)  # on each: activations
    if model.component == "vae":
        roomiest = max(limits, key=lambda index: limits[index])
        limits, way = {roomiest: limits[roomiest]}, "auto"
    built = looking.built(model.component, stage)
    placement = placed(built, way, limits, room)
    gpus = {str(index): size + room for index, size in bytes_by_gpu(built, placement).items()}
    return replace(
        model,
        placement=placement,
        gpus=gpus,
        limits={str(index): limits[index] for index in limits},
    )


def process(
    config: DictConfig, regions: Regions, note: Callable[[str], None] = lambda text: None
) -> tuple[int, int, Looking]:
    """(peak of importing, RES before the first weight, the run's checkpoint): nothing has been computed yet."""
    with light_imports():
        from accelerate import init_empty_weights  # noqa: F401
        from diffusers import AutoencoderKL  # noqa: F401
    checkpoint = open_checkpoint(config, facts_of(config).opened, lambda _: None)
    rehearse(config, checkpoint, note)
    looking = Looking(config=config, regions=regions, checkpoint=checkpoint)
    held = (
        make_scheduler(checkpoint, config.scheduler.class_name, config.scheduler.options),
        checkpoint.component(looking.family.facts.denoiser).build(),
    )
    imports = own_peak_rss()
    drop_clean_pages()
    base = usage(os.getpid()).rss
    del held
    return imports, base, looking


def flops_per_second(dtype: torch.dtype) -> float:
    """Of a 3x3 convolution as these models have them, measured in about a quarter of a second."""
    conv: Any = nn.Conv2d(320, 320, 3, padding=1, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last)
    image = torch.randn(2, 320, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    count, best = 2 * image.numel() * 320 * 9, 0.0
    with torch.inference_mode():
        conv(image)  # which makes its kernel
        end, turns = time.monotonic() + 0.25, 0
        while turns < 5 or time.monotonic() < end:
            begin = time.monotonic()
            conv(image)
            best, turns = max(best, count / (time.monotonic() - begin)), turns + 1
    return best * 0.6  # a whole model's share of its best layer


def touched(model: ModelProfile, facts: Facts, dtype: torch.dtype, code: int = 0) -> int:
    """Bytes that a process grows by when a model has run once in all its shapes in ``dtype``; ``code``: of its kernels
    and their primitives, where a stage knows better."""
    size = min(1.0, model.weights / FULL_SIZE)
    unet = facts.unet and model.component == facts.denoiser
    pieces = 0 if model.component == "vae" else int((UNET_PIECES if unet else PIECES) * size)
    own = (UNET_CODE + BF16_CODE * (dtype == torch.bfloat16)) if unet else CODE
    return (code or own + int(PRIMITIVES * size)) + pieces


def left(models: Sequence[ModelProfile]) -> int:
    """Bytes that all but the last of ``models``, open one after the other, leave in the process."""
    return sum(int(LEFT * min(1.0, model.weights / FULL_SIZE)) for model in models[:-1])


def staging(model: ModelProfile) -> int:
    """Bytes of the buffer that raw weights are converted from, as far as the largest unit fills it."""
    return min(STAGING_BYTES, max(model.cuts[-1].nbytes.values()))
