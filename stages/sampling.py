"""What ``lowres`` and ``denoise`` share: open the denoiser, run the sampler, keep a checkpoint after every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from stages.canvas.mixture import Mixture, View
from stages.canvas.noise import Reroll, canvas_noise
from stages.canvas.sampler import Sampler
from stages.canvas.views import region_views
from stages.context import StageContext
from stages.memory.tensors import read_tensors
from stages.models.loading import compute_dtype, open_checkpoint, open_model
from stages.models.schedulers import make_scheduler
from stages.models.sd import UNetDenoiser, micro_batch
from stages.regions.config import from_config
from stages.regions.scale import lowres_plan, lowres_side
from stages.tiles import Size
from stages.workflow.store import CHECKPOINT


class Canvas(NamedTuple):
    """What is denoised: ``size`` in latents, its views, the rectangles of its noise with a seed of their own."""

    size: Size
    views: list[View]
    rerolls: tuple[Reroll, ...]


def lowres_canvas(config: DictConfig) -> Canvas:
    """The low-res one. Regions and re-rolled rectangles are those of the picture, scaled: they lay it out."""
    factor, plan = config.model.vae_scale_factor, lowres_plan(config)
    size, side = Size(config.lowres.height // factor, config.lowres.width // factor), lowres_side(config, plan)
    overlap, guidance = min(side) // 4, config.lowres.guidance_scale
    views = region_views(plan, size, side=side, overlap=overlap, blend="gaussian", guidance_scale=guidance)
    return Canvas(size, views, plan.rerolls)


def denoise_canvas(config: DictConfig) -> Canvas:
    """The picture's, in tiles; every region has tiles of its own."""
    factor, plan, denoise = config.model.vae_scale_factor, from_config(config), config.denoise
    size = Size(config.height // factor, config.width // factor)
    views = region_views(
        plan,
        size,
        side=Size(denoise.tile_size // factor, denoise.tile_size // factor),
        overlap=denoise.overlap // factor,
        blend=denoise.blend,
        guidance_scale=denoise.guidance_scale,
    )
    return Canvas(size, views, plan.rerolls)


def sample(
    context: StageContext,
    canvas: Canvas,
    *,
    num_inference_steps: int,
    **guide: Any,
) -> Sampler:
    """Denoise a canvas; returns the sampler, finished.

    A killed stage goes on after the last finished step, with the same result to the bit. ``guide``: the guide's
    arguments of :class:`stages.canvas.sampler.Sampler`.
    """
    config, progress = context.config, context.progress
    size, views, rerolls = canvas
    checkpoint = open_checkpoint(config, ("unet", "scheduler"), progress.note)
    component = checkpoint.component("unet")
    scheduler = make_scheduler(checkpoint, config.scheduler.class_name, config.scheduler.options)
    folder = context.output / CHECKPOINT
    path = folder / "noise.safetensors"
    noise, generator = canvas_noise(path, size, config.model.latent_channels, config.seed, rerolls)
    sampler = Sampler(
        scheduler=scheduler,
        mixture=Mixture(views),
        num_inference_steps=num_inference_steps,
        noise=noise,
        generator=generator,
        folder=folder,
        **guide,
    )
    try:
        if sampler.resume():
            progress.resumed(f"step {sampler.step} of {len(sampler.timesteps)}")
    except ValueError as error:
        progress.note(f"warning: the checkpoint cannot be used ({error}); starts from the first step")
    progress.start(len(sampler.timesteps), "steps", sampler.step)
    if sampler.finished:
        return sampler

    embeddings = read_tensors(context.inputs["text_encode"] / "embeddings.safetensors")
    dtype, tile = compute_dtype(config), views[0].tile.size
    batch = context.plan.get("micro_batch") or micro_batch(component.config, *tile, config.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.technique.tf32
    with open_model(
        component,
        dtype=dtype,
        channels_last=config.technique.channels_last,
        plan=context.plan,
        micro_batch=batch,
        mark=progress.mark,
        device=config.device,
    ) as streamer:
        denoiser = UNetDenoiser(
            streamer.model,
            embeddings["prompt_embeds"],
            embeddings["negative_prompt_embeds"],
            dtype=dtype,
            device=config.device,
            channels_last=config.technique.channels_last,
            run=streamer.graphed,
        )
        group_size = context.plan.get("group_size") or max(1, batch // 2)
        while not sampler.finished:
            sampler.advance(denoiser, group_size)
            progress.advance()
    return sampler
