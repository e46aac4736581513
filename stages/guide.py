"""The guide: the low-res picture (or the user's own) enlarged to the canvas, and encoded again tile by tile."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from omegaconf import DictConfig

from stages import multiple, phase_size
from stages.context import StageContext
from stages.families.autoencoder import decode_call, encode_call, exact_look, keys_bytes, rolling_look
from stages.families.looking import Looking, StageLook
from stages.families.opening import DECODER, ENCODER, open_vae
from stages.files import atomic_path, read_json, write_json
from stages.memory.disk import SCRATCH
from stages.memory.planner import Cut, ModelProfile
from stages.memory.rows import Rows
from stages.models.loading import Streamer
from stages.models.upscaler import COMPONENT, Upscaler, enlarge, places
from stages.models.upscaler import KEY as UPSCALE
from stages.paths import is_safetensors
from stages.picture.opening import check_whole, look_at, open_picture, opening_bytes
from stages.picture.picture import Picture
from stages.preview import learn
from stages.tiles import Size
from stages.vae.encoding import encode
from stages.vae.exact_scratch import open_scratch
from stages.vae.exact_vae import Direction, exact_decode
from stages.vae.rolling_vae import decoded, decoder_statistics, rolls
from stages.vae.tiled import HALO, decode_tiled, factor, guide_tiles
from stages.workflow.store import CHECKPOINT, digest

ENLARGED = "enlarged.safetensors"


def run(context: StageContext) -> None:
    """Write ``lowres.png`` (the preview), ``latents.safetensors`` (``[1, C, H/f, W/f]`` float32) and, of a trained
    upscaler, ``enlarged.safetensors`` (``pixels [1, 3, h, w]`` uint8)."""
    config, progress = context.config, context.progress
    f = config.model.vae_scale_factor
    shape = (config.model.latent_channels, config.height // f, config.width // f)
    in_pixels, trained = config.guide.image or config.guide.upscale != "latent", is_safetensors(config.guide.upscale)
    scratch = context.output / CHECKPOINT
    halves = {"encoder": bool(in_pixels), "decoder": not config.guide.image}
    if config.guide.image:  # before the model is there: some kinds are decoded as a whole
        image, canvas = Path(config.guide.image), Size(config.height, config.width)
        picture = open_picture(image, scratch / "picture.safetensors", canvas, config.guide.fit, f, progress.note)
        small = picture.resized((config.lowres.width, config.lowres.height))
        _preview(context, Picture.of(small, scratch / "lowres.safetensors"))
        picture = _enlarged(context, picture) if trained else picture
    latents = None if config.guide.image else _source(context)
    if trained and latents is not None:  # models are open one after the other
        with open_vae(context, **halves) as streamer:
            picture = _shown(context, streamer, latents, scratch)
        picture = _enlarged(context, picture)
    with open_vae(context, **halves) as streamer:
        if latents is not None and not trained:
            picture = _shown(context, streamer, latents, scratch)
        if in_pixels and (latents is None or latents.shape[1:] != shape):
            guide = encode(context, streamer, picture, shape, scratch)
        else:
            assert latents is not None
            progress.start(1, "tiles")
            guide = _enlarge(latents, Rows.create(scratch / "latents.safetensors", shape))
            progress.advance()
    with atomic_path(context.output / "latents.safetensors") as temporary:
        os.replace(guide.path, temporary)


def _source(context: StageContext) -> Rows:
    """The latents to enlarge: of the low-res picture, or of the canvas of the upscaling phase before this one."""
    if "lowres" in context.inputs:
        return Rows.open(context.inputs["lowres"] / "latents.safetensors")
    return Rows.open(context.inputs["denoise"] / "canvas.safetensors")


def _shown(context: StageContext, streamer: Streamer, latents: Rows, scratch: Path) -> Picture:
    """The picture to enlarge, decoded and shown."""
    picture = _decode(context, streamer, latents, scratch / "picture.safetensors")
    if "lowres" in context.inputs:
        learn(context, latents.read(0, latents.height)[0], picture.pixels.read(0, picture.height)[0])
    _preview(context, picture)
    return picture


def _preview(context: StageContext, picture: Picture) -> None:
    """``lowres.png``, and in a later upscaling phase ``previous.png``: the picture that it enlarges."""
    name = "lowres.png"
    if "guide" in context.inputs:
        with atomic_path(context.output / name) as temporary:
            shutil.copyfile(context.inputs["guide"] / name, temporary)
        name = "previous.png"
    with atomic_path(context.output / name) as temporary:
        picture.save_png(temporary)
    context.progress.note(f"preview: {context.run_dir / context.name / name}")


def _decode(context: StageContext, streamer: Streamer, latents: Rows, file: Path) -> Picture:
    """The picture to enlarge; in tiles if it is larger than one."""
    mark = file.with_suffix(".json")
    if not _whole(context, file, mark, "decoded"):  # else an earlier try was stopped later
        f = factor(streamer.model)
        with atomic_path(file) as temporary:
            picture = Picture.create(temporary, latents.width * f, latents.height * f)
            shared, side = context.config.guide.vae_mode == "shared", context.config.guide.tile_size // f
            if context.config.guide.vae_mode == "exact":
                _decode_exactly(context, streamer, latents, picture)
            elif shared and rolls(streamer.model, context.config.device):
                folder = context.output / f"{SCRATCH}_statistics"
                options = {"hold": streamer.hold, "mark": context.progress.mark}
                statistics = decoder_statistics(streamer.model, latents, side + 2 * HALO, folder, **options)
                decoded(streamer.model, latents, statistics, picture.pixels, **options)
            else:
                decode_tiled(streamer.model, latents, side, picture.pixels.write, shared=shared)
        write_json(mark, {"sha256": digest(file)})
    return Picture(Rows.open(file, "pixels"))


def _enlarged(context: StageContext, picture: Picture) -> Picture:
    """By the trained upscaler, a picture that is smaller than the canvas."""
    config, file = context.config, context.output / ENLARGED
    if picture.width >= config.width and picture.height >= config.height:
        context.progress.note(f"{UPSCALE}: the picture is as large as the canvas already, and is left as it is")
        return picture
    mark = context.output / CHECKPOINT / "enlarged.json"
    if not _whole(context, file, mark, "enlarged"):
        upscaler = Upscaler(Path(config.guide.upscale), str(config.device))
        context.progress.mark(COMPONENT)
        context.progress.start(len(places(picture.height)) * len(places(picture.width)), "tiles")
        with atomic_path(file) as temporary:
            enlarge(upscaler, picture, temporary, context.progress.advance)
        write_json(mark, {"sha256": digest(file)})
    return Picture(Rows.open(file, "pixels"))


def _whole(context: StageContext, file: Path, mark: Path, again: str) -> bool:
    """Whether an earlier try left the picture, and every byte of it is as it was; one that is damaged is named."""
    if file.is_file() and read_json(mark) == {"sha256": digest(file)}:
        return True
    if file.exists() and mark.exists():
        context.progress.note(f"warning: {file.name} is damaged; it is {again} again")
    return False


def _decode_exactly(context: StageContext, streamer: Streamer, latents: Rows, picture: Picture) -> None:
    size = Size(latents.height, latents.width)
    folder, options = open_scratch(context, streamer, "decode", size)
    pixels = exact_decode(streamer.model, latents.read, size, folder, **options)
    for top, bottom in picture.strips():
        picture.pixels.write(top, pixels.read(top, bottom))
    pixels.remove()


def _enlarge(latents: Rows, guide: Rows) -> Rows:
    """The latents themselves, enlarged (bicubic), channel by channel; returns ``guide``."""
    source, size = latents.read(0, latents.height), (guide.height, guide.width)
    for channel in range(guide.channels):
        plane = source[:, channel : channel + 1]
        if latents.shape != guide.shape:  # else there is nothing to enlarge
            plane = F.interpolate(plane, size=size, mode="bicubic", antialias=False)
        guide.write_flat(channel * plane.numel(), plane.flatten())
    return guide


def look(looking: Looking) -> StageLook:
    """The decoder over the picture that is enlarged, the encoder over the canvas, where the guide needs them."""
    config, f = looking.config, looking.config.model.vae_scale_factor
    size, source = Size(config.height // f, config.width // f), _source_size(config)
    encodes = bool(config.guide.image) or config.guide.upscale != "latent"
    decodes = not config.guide.image or bool(config.guide.phases)  # what one after the first enlarges
    if config.guide.vae_mode == "exact":
        passes: list[tuple[Direction, Size]] = [("encode", size)] if encodes else []
        found = exact_look(looking, "guide", [*passes, ("decode", source)] if decodes else passes)
    elif config.guide.vae_mode == "shared" and (rolled := _rolling_look(looking, size, source, encodes, decodes)):
        found = rolled
    else:
        found = _tiled_look(looking, size if encodes else None, source if decodes else None)
    opened = 0
    image, fit = Path(config.guide.image or ""), config.guide.fit
    enlarged = [Size(source.height * f, source.width * f)] if decodes or not image.is_file() else []
    if image.is_file():  # else its guide is there, or it is refused when the stage begins
        canvas = _first_canvas(config)
        check_whole(image, canvas, fit, f)
        opened, kept = opening_bytes(image, canvas, fit, f), look_at(image).kept(canvas, fit, f)
        # a phase gets its share of what is said here
        enlarged.append(Size(kept.height * config.height // canvas.height, kept.width * config.width // canvas.width))
    models, disk = found.models, found.disk
    if is_safetensors(config.guide.upscale):
        upscaler = Upscaler(Path(config.guide.upscale))
        small = [one for one in enlarged if one.height < config.height or one.width < config.width]
        if small:
            tiles = max(len(places(one.height)) * len(places(one.width)) for one in small)
            large = [Size(one.height * upscaler.scale, one.width * upscaler.scale) for one in small]
            models, disk = (upscaler.profile(tiles), *models), disk + max(3 * one.height * one.width for one in large)
            enlarged += large
    held = max(_held_bytes(config, one) for one in enlarged)
    return found._replace(models=models, disk=disk, extra=held + found.extra, before=opened)


def _tiled_look(looking: Looking, encoded: Size | None, decoded: Size | None) -> StageLook:
    """Of tiles; sizes in latents of what is encoded and of what is decoded."""
    config, f = looking.config, looking.config.model.vae_scale_factor
    tile = config.guide.tile_size // f
    side, calls, counts = tile + 2 * HALO, [], {}
    if encoded is not None:
        shape = Size(min(side, encoded.height) * f, min(side, encoded.width) * f)
        calls.append(encode_call(config, shape))
        counts["encoder"] = len(guide_tiles(encoded, tile)) + 1
    if decoded is not None:
        shape = Size(min(side, decoded.height), min(side, decoded.width))
        calls.append(decode_call(config, shape))
        counts["decoder"] = max(1, decoded.height * decoded.width // (shape.height * shape.width))
    drop = (() if encoded else ENCODER) + (() if decoded else DECODER)

    def call(vae: Any, samples: int) -> None:
        for one in calls:
            one(vae, samples)

    measured = looking.measured(("guide", encoded, decoded), "vae", "guide", call, drop=drop)
    most = max(counts.values())
    profile = ModelProfile(
        component="vae",
        weights=measured.weights,
        micro_batch=1,
        micro_batches=most,
        steps=1,
        cuts=tuple(_weighted(cut, {half: count / most for half, count in counts.items()}) for cut in measured.cuts),
        ordered=False,
        quantised=measured.quantised,
    )
    shared = config.guide.vae_mode == "shared"
    return StageLook((profile,), extra=keys_bytes(looking, side * side) if shared else 0)


def _rolling_look(looking: Looking, size: Size, source: Size, encodes: bool, decodes: bool) -> StageLook | None:
    """Of rolling passes; None where tiles are what goes through the VAE."""
    built = looking.built("vae", "guide", (() if encodes else ENCODER) + (() if decodes else DECODER))
    if not (encodes or decodes) or not rolls(built.network, looking.config.device):
        return None
    passes: list[tuple[Direction, Size]] = [("encode", size)] if encodes else []
    if decodes:
        passes.append(("decode", source))
    side = looking.config.guide.tile_size // looking.config.model.vae_scale_factor + 2 * HALO
    return rolling_look(looking, built, passes, side)


def _weighted(cut: Cut, shares: dict[str, float]) -> Cut:
    """``shares``: how many of the micro-batches that are counted a half of the VAE sees."""
    return replace(cut, flops={name: int(n * shares.get(name.partition(".")[0], 1.0)) for name, n in cut.flops.items()})


def _source_size(config: DictConfig) -> Size:
    """Latents of the picture that the last guide enlarges."""
    f, (width, height) = config.model.vae_scale_factor, (config.lowres.width, config.lowres.height)
    if config.guide.phases:
        width, height = phase_size(config.width, config.height, config.guide.phases[-1], multiple(config))
    return Size(height // f, width // f)


def _first_canvas(config: DictConfig) -> Size:
    """Pixels of the canvas that the first guide is for."""
    width, height = config.width, config.height
    if config.guide.phases:
        width, height = phase_size(width, height, config.guide.phases[0], multiple(config))
    return Size(height, width)


def _held_bytes(config: DictConfig, enlarged: Size) -> int:
    """What the guide holds besides the model: rows of the picture that it enlarges and of the canvas' latents."""
    f, tile, (height, width) = config.model.vae_scale_factor, config.guide.tile_size, enlarged
    blend = min(tile, height) * width * 3 * 4  # a row of tiles, as floats
    shrunk = height * (tile + 16 * f) * 3 * 3  # the whole picture narrowed, and Pillow's copy of it
    crop = (tile + 16 * f) * height // config.height + 8  # rows of the picture that one row of crops is cut from
    latents = min(tile, config.height) // f * (config.width // f) * config.model.latent_channels * 4
    return max(blend, shrunk, 2 * latents + crop * width * 3)
