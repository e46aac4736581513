"""The guide: the low-res picture (or the user's own) enlarged to the canvas, and encoded again tile by tile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stages.context import StageContext
from stages.files import atomic_path, read_json, write_json
from stages.memory.rows import Rows
from stages.models.loading import Streamer
from stages.picture.opening import open_picture
from stages.picture.picture import Picture
from stages.tiles import Size, Tile
from stages.vae.exact_scratch import open_scratch
from stages.vae.exact_vae import exact_decode, exact_encode
from stages.vae.open import open_vae
from stages.vae.tiled import HALO, decode_tiled, encode_tiled, encoder_statistics, factor, guide_tiles
from stages.workflow.store import CHECKPOINT


def run(context: StageContext) -> None:
    """Write ``lowres.png`` (the preview) and ``latents.safetensors`` (``[1, C, H/f, W/f]`` float32)."""
    config, progress = context.config, context.progress
    f = config.model.vae_scale_factor
    shape = (config.model.latent_channels, config.height // f, config.width // f)
    in_pixels = config.guide.image or config.guide.upscale == "lanczos"
    scratch = context.output / CHECKPOINT
    halves = {"encoder": bool(in_pixels), "decoder": not config.guide.image}
    if config.guide.image:  # before the model is there: Pillow holds the whole of it
        picture = Picture.of(open_picture(Path(config.guide.image)), scratch / "picture.safetensors")
        small = picture.resized((config.lowres.width, config.lowres.height))
        _preview(context, Picture.of(small, scratch / "lowres.safetensors"))
    with open_vae(config, plan=context.plan, **halves, note=progress.note, mark=progress.mark) as streamer:
        latents = None
        if not config.guide.image:
            latents = _source(context)
            picture = _decode(context, streamer, latents, scratch / "picture.safetensors")
            _preview(context, picture)
        if in_pixels and (latents is None or latents.shape[1:] != shape):
            guide = _encode(context, streamer, picture, shape)
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
    if not file.is_file():  # else an earlier try was stopped later
        f = factor(streamer.model)
        with atomic_path(file) as temporary:
            picture = Picture.create(temporary, latents.width * f, latents.height * f)
            if context.config.guide.vae_mode == "exact":
                _decode_exactly(context, streamer, latents, picture)
            else:
                shared, side = context.config.guide.vae_mode == "shared", context.config.guide.tile_size // f
                decode_tiled(streamer.model, latents, side, picture.pixels.write, shared=shared)
    return Picture(Rows.open(file, "pixels"))


def _decode_exactly(context: StageContext, streamer: Streamer, latents: Rows, picture: Picture) -> None:
    size = Size(latents.height, latents.width)
    folder, options = open_scratch(context, streamer, "decode", size)
    pixels = exact_decode(streamer.model, latents.read, size, folder, **options)
    for top, bottom in picture.strips():
        picture.pixels.write(top, pixels.read(top, bottom))
    pixels.remove()


def _to_tensor(picture: Image.Image) -> Tensor:
    """``[1, 3, h, w]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def _enlarge(latents: Rows, guide: Rows) -> Rows:
    """The latents themselves, enlarged (bicubic), channel by channel; returns ``guide``."""
    source, size = latents.read(0, latents.height), (guide.height, guide.width)
    for channel in range(guide.channels):
        plane = source[:, channel : channel + 1]
        if latents.shape != guide.shape:  # else there is nothing to enlarge
            plane = F.interpolate(plane, size=size, mode="bicubic", antialias=False)
        guide.write_flat(channel * plane.numel(), plane.flatten())
    return guide


def _encode(context: StageContext, streamer: Streamer, picture: Picture, shape: tuple[int, int, int]) -> Rows:
    """Guide latents of the canvas: each crop is cut from the enlarged picture, which never exists as a whole.

    A killed stage goes on with the row of tiles that it was in.
    """
    config, progress = context.config, context.progress
    vae: Any = streamer.model
    f = factor(vae)
    across, down = picture.width / config.width, picture.height / config.height

    def read(box: Tile) -> Tensor:
        region = (box.left * across, box.top * down, box.right * across, box.bottom * down)
        return _to_tensor(picture.cut(region, (box.right - box.left, box.bottom - box.top)))

    if config.guide.vae_mode == "exact":
        return _encode_exactly(
            context, streamer, lambda top, bottom: read(Tile(0, 0, top, 0, bottom, config.width)), shape
        )
    side, folder = config.guide.tile_size // f, context.output / CHECKPOINT
    tiles = guide_tiles(Size(*shape[1:]), side)
    limit = (side + 2 * HALO) * f
    extent = (picture.width, picture.height)
    if max(extent) > limit:
        scale = limit / max(extent)
        extent = (max(f, round(picture.width * scale) // f * f), max(f, round(picture.height * scale) // f * f))
    file, mark = folder / "latents.safetensors", folder / "rows.json"
    first = (read_json(mark) or {}).get("rows", 0) if file.is_file() else 0
    if first:
        guide = Rows.open(file)
        progress.resumed(f"row {first} of {tiles[-1].row + 1}")
    else:
        mark.unlink(missing_ok=True)  # of a file that has been put in its place since
        guide = Rows.create(file, shape)

    def keep(row: int) -> None:
        guide.sync()
        write_json(mark, {"rows": row})

    progress.start(len(tiles), "tiles", sum(tile.row < first - 1 for tile in tiles))
    shared = config.guide.vae_mode == "shared"
    statistics = encoder_statistics(vae, _to_tensor(picture.resized(extent))) if shared else None
    with statistics.applied(vae) if statistics else nullcontext():
        encode_tiled(vae, read, tiles, HALO, guide, done=progress.advance, first=first, kept=keep)
    return guide


def _encode_exactly(
    context: StageContext, streamer: Streamer, rows: Callable[[int, int], Tensor], shape: tuple[int, int, int]
) -> Rows:
    guide = Rows.create(context.output / CHECKPOINT / "latents.safetensors", shape)
    size = Size(*shape[1:])
    folder, options = open_scratch(context, streamer, "encode", size)
    exact_encode(streamer.model, rows, size, folder, guide.write, **options)
    guide.sync()
    return guide
