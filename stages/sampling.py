"""What ``lowres`` and ``denoise`` share: open the denoiser, run the sampler, keep a checkpoint after every step."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any, NamedTuple

import torch

from stages.canvas.dilated import Dilated
from stages.canvas.mixture import Grouping, Mixture, View
from stages.canvas.noise import Reroll, canvas_noise
from stages.canvas.sampler import Sampler
from stages.config import ConfigError
from stages.context import StageContext
from stages.families import family_of
from stages.families.looking import Looking, StageLook
from stages.families.opening import open_checkpoint, open_component
from stages.families.schedules import make_scheduler
from stages.memory.planner import ModelProfile
from stages.memory.rows import Rows, bands
from stages.memory.tensors import read_tensors
from stages.models.loading import shared_out
from stages.preview import Preview
from stages.techniques import techniques_of
from stages.techniques.dtype import dtype_of
from stages.tiles import Size
from stages.workflow.store import CHECKPOINT

STANDING = 150_000  # bytes of a micro-batch that stands still, without its activations: what its holes in the heap cost


class Canvas(NamedTuple):
    """What is denoised: ``size`` in latents, its views, the rectangles of its noise with a seed of their own."""

    size: Size
    views: list[View]
    rerolls: tuple[Reroll, ...]


def sample(
    context: StageContext,
    canvas: Canvas,
    *,
    num_inference_steps: int,
    dilated: Dilated | None = None,
    **guide: Any,
) -> Sampler:
    """Denoise a canvas; returns the sampler, finished.

    A killed stage goes on after the last finished step, with the same result to the bit. ``dilated``: the global term,
    if there is one. Of several ranks only the first one's sampler has the latents.
    ``guide``: the guide's arguments of :class:`stages.canvas.sampler.Sampler`.
    """
    config, progress, family = context.config, context.progress, family_of(context.config)
    name = family.facts.denoiser
    checkpoint = open_checkpoint(config, family.facts.components[context.stage.module], progress.note)
    network_config = checkpoint.config(name)
    scheduler = make_scheduler(checkpoint, config.scheduler.class_name, config.scheduler.options)
    ranks = context.ranks()
    folder = context.output / CHECKPOINT / (f"rank_{ranks.rank:03d}" if ranks.rank else "")
    path, channels, space = folder / "noise.safetensors", config.model.latent_channels, family.space(checkpoint)
    if ranks.first:
        noise, generator = canvas_noise(path, canvas.size, channels, config.seed, canvas.rerolls, space.patch)
    else:
        noise, generator = Rows.create(path, (channels, *canvas.size)), torch.Generator()
    views, techniques = family.asks(canvas.views, checkpoint), techniques_of(config, context.stage.module)
    sampler = Sampler(
        schedule=family.schedule(scheduler, views[0].tile.size, checkpoint),
        mixture=Mixture(views),
        num_inference_steps=num_inference_steps,
        noise=noise,
        generator=generator,
        folder=folder,
        dilated=dilated and dilated.asked(lambda views: family.asks(views, checkpoint)),
        space=space,
        ranks=ranks,
        period=lcm(*(technique.period for technique in techniques)),
        **guide,
    )
    try:
        if sampler.resume():
            progress.resumed(f"step {sampler.step} of {len(sampler.timesteps)}")
        if sampler.damaged:
            progress.note(f"warning: {sampler.damaged}; goes on from step {sampler.step}")
    except ValueError as error:
        progress.note(f"warning: the checkpoint cannot be used ({error}); starts from the first step")
    progress.start(len(sampler.timesteps), "steps", sampler.step)
    if sampler.finished:
        return sampler

    every = config.preview[context.stage.module] if ranks.first else 0
    preview = Preview(context, canvas.size) if every else None
    for technique in techniques:
        technique.prepare(context, canvas.size, folder)
    sampler.mixture.turns = next((turns for one in techniques if (turns := one.turns(folder))), None)
    batch = context.plan.micro_batch or family.micro_batch(network_config, views[0].tile.size, config.device)
    with open_component(context, checkpoint, name, techniques=techniques, micro_batch=batch) as streamer:
        denoiser = family.denoiser(
            streamer.model,
            read_tensors(context.inputs["text_encode"] / "embeddings.safetensors"),
            config,
            canvas=canvas.size,
            dtype=dtype_of(config, name),
            device=config.device,
            techniques=techniques,
            run=streamer.graphed,
        )
        grouping = Grouping(context.plan.group_size or batch, batch)
        while not sampler.finished:
            for technique in techniques:
                technique.begin(sampler.step, len(sampler.timesteps), folder)
            step = sampler.step + 1
            shown = preview if every and (step % every == 0 or step == len(sampler.timesteps)) else None
            sampler.advance(denoiser, grouping, shown and shown.add)
            if ranks.first:
                progress.advance()
            if shown is not None:
                shown.write()
    ranks.wait()
    return sampler


def look(looking: Looking, stage: str, canvas: Canvas, more: Sequence[View] = ()) -> StageLook:
    """The denoiser over a canvas, one step of it; ``more``: views of the dilated canvases of each step."""
    config, family = looking.config, looking.family
    name, channels = family.facts.denoiser, config.model.latent_channels
    network_config, size = looking.network_config(name), canvas.size
    views, more = (family.asks(some, looking.checkpoint) for some in (canvas.views, more))
    tile = views[0].tile.size
    if (most := family.largest_tile(network_config)) and max(max(view.tile.size) for view in (*views, *more)) > most:
        key, factor = "denoise.tile_size" if stage == "denoise" else "lowres.width", config.model.vae_scale_factor
        raise ConfigError(
            key, max(tile) * factor, f"tiles of at most {most * factor} pixels, as the model has positions"
        )
    dtype, techniques = dtype_of(config, name), techniques_of(config, stage)
    pixels = Size(*(side * config.model.vae_scale_factor for side in size))
    before = max((technique.opening(pixels) for technique in techniques), default=0)
    # views with and without guidance do not share a micro-batch
    samples = [
        sum(view.passes for view in some if view.passes == guided) for some in (views, more) for guided in (1, 2)
    ]
    batch = min(family.micro_batch(network_config, tile, config.device), max(samples))

    def call(network: Any, samples: int) -> Any:
        example, embeds = family.example(network_config, tile, samples, config.model.text_tokens)
        if family.guidance(looking.checkpoint) == "none":  # then no negative prompt is encoded
            embeds = {name: rows for name, rows in embeds.items() if not name.startswith("negative_")}
        options: dict[str, Any] = {"dtype": dtype, "device": "meta", "techniques": techniques}
        denoiser = family.denoiser(network, embeds, config, canvas=size, **options)
        del embeds  # it holds its own
        return denoiser(example, torch.empty((), device="meta"))

    # the low-res picture is often as large as a tile
    part, lanes = shared_out(techniques, batch, config.device)
    key = (tile, batch, tuple(one.name for one in techniques))
    measured = looking.measured(
        key, name, stage, call, size=batch, part=part, lanes=lanes, whole_stages=config.device != "cpu"
    )
    state = dtype.itemsize * sum(one.state(network_config, tile) for one in techniques)
    profile = ModelProfile(
        component=name,
        micro_batch=batch,
        micro_batches=sum(-(-number // batch) for number in samples),
        together=max(1, max(view.passes for view in (*views, *more)) // batch),
        steps=1,
        state=state,
        **measured._asdict(),
    )
    parts = bands(*size, channels=channels)
    band = channels * parts[0][1] * size.width * 4
    rows = channels * tile.height * size.width * 4
    blurred = 4 * band if more else 0  # twice, with padding
    # a band of the canvas, its noise, guide, prediction, the scheduler's history and temporaries, of the band before it
    # what is still being written; and the rows of latents and predictions that the tiles of the moment lie in
    kept = state * sum(samples) if profile.micro_batches > profile.together else 0  # else it stays in memory
    extra = blurred + (12 if len(parts) == 1 else 16) * band + 2 * rows
    if any(technique.through for technique in techniques):  # groups that stand still
        kept += profile.micro_batches * max(line.slope for cut in profile.cuts for line in cut.lines)
        extra += profile.micro_batches * STANDING
    return StageLook((profile,), extra=extra, before=before, disk=kept)
