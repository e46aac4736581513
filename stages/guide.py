"""The guide: the low-res picture (or the user's own) enlarged to the canvas, and encoded again tile by tile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from stages.canvas.picture import Picture, RowBlend
from stages.canvas.tiles import Size, Tile, grid, whole
from stages.canvas.vae import decode_tile, decoder_statistics, encode_tiled, encoder_statistics, factor, to_uint8
from stages.canvas.weights import grid_weights
from stages.config import ConfigError
from stages.context import StageContext
from stages.memory.rows import Rows
from stages.models.loading import Streamer
from stages.models.vae import open_vae
from stages.workflow.store import CHECKPOINT, atomic_path

HALO = 8  # latents of context around a tile, decoding and encoding


def run(context: StageContext) -> None:
    """Write ``lowres.png`` (the preview) and ``latents.safetensors`` (``[1, C, H/f, W/f]`` float32)."""
    config, progress = context.config, context.progress
    f = config.model.vae_scale_factor
    shape = (config.model.latent_channels, config.height // f, config.width // f)
    in_pixels = config.guide.image or config.guide.upscale == "lanczos"
    scratch = context.output / CHECKPOINT / "picture.safetensors"
    latents = picture = None
    if config.guide.image:
        picture = Picture.of(open_picture(Path(config.guide.image)), scratch)
        small = picture.resized((config.lowres.width, config.lowres.height))
        _preview(context, Picture.of(small, scratch.with_name("lowres.safetensors")))
    else:
        latents = _source(context)
    halves = {"encoder": bool(in_pixels), "decoder": not config.guide.image}
    with (
        open_vae(config, plan=context.plan, **halves, note=progress.note, mark=progress.mark) as streamer,
        atomic_path(context.output / "latents.safetensors") as temporary,
    ):
        guide = Rows.create(temporary, shape)
        if latents is not None:
            picture = _decode(streamer, latents, config.guide.tile_size // f, scratch)
            _preview(context, picture)
        if latents is not None and latents.shape == guide.shape:
            progress.start(1, "tiles")
            for top, rows in latents.bands():  # the canvas is as large as the picture: nothing to enlarge
                guide.write(top, rows)
            progress.advance()
        elif latents is not None and not in_pixels:
            progress.start(1, "tiles")
            _enlarge(latents, guide)
            progress.advance()
        else:
            assert picture is not None
            _encode(context, streamer, picture, guide)


def _source(context: StageContext) -> Rows:
    """The latents to enlarge: of the low-res picture, or of the canvas of the upscaling phase before this one."""
    if "lowres" in context.inputs:
        return Rows.open(context.inputs["lowres"] / "latents.safetensors")
    return Rows.open(context.input("denoise") / "canvas.safetensors")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """ConfigError for what Pillow says of files that are no pictures, broken, or of more than 178 million pixels."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError("guide.image", str(path), "a picture that Pillow can read", f"It says: {error}") from error


def opening_bytes(path: Path) -> int:
    """What ``open_picture`` takes: four bytes a pixel, twice where the picture is turned or converted."""
    with _readable(path), Image.open(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return picture.width * picture.height * (8 if turned or picture.mode != "RGB" else 4)


def open_picture(path: Path) -> Image.Image:
    """The user's picture as 8-bit RGB, turned as its EXIF says. ConfigError if it is none."""
    with _readable(path):
        picture = Image.open(path)
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def _preview(context: StageContext, picture: Picture) -> None:
    """``lowres.png``, and in a later upscaling phase ``previous.png``: the picture that it enlarges."""
    name = "lowres.png"
    if any(stage.startswith("guide") for stage in context.inputs):
        with atomic_path(context.output / name) as temporary:
            shutil.copyfile(context.input("guide") / name, temporary)
        name = "previous.png"
    with atomic_path(context.output / name) as temporary:
        picture.save_png(temporary)
    context.progress.note(f"preview: {context.run_dir / context.name / name}")


def _tiles(size: Size, side: int) -> list[Tile]:
    return grid(size, Size(side, side), min(4, side // 4))


def _decode(streamer: Streamer, latents: Rows, side: int, file: Path) -> Picture:
    """The picture to enlarge; in tiles with shared statistics if it is larger than one."""
    vae: Any = streamer.model
    f, size = factor(vae), Size(latents.height, latents.width)
    picture = Picture.create(file, size.width * f, size.height * f)
    if max(size) <= side + 2 * HALO:
        pixels = decode_tile(vae, latents.read(0, latents.height), whole(size)).float()
        picture.pixels.write(0, to_uint8(pixels))
        return picture
    statistics = decoder_statistics(vae, latents, side + 2 * HALO)
    tiles = _tiles(size, side)
    weights = grid_weights([tile.scaled(f) for tile in tiles], Size(picture.height, picture.width), "cosine")
    blend = RowBlend(3, picture.width, lambda top, rows: picture.pixels.write(top, to_uint8(rows)))
    with statistics.applied(vae):
        for tile, weight in zip(tiles, weights, strict=True):
            crop = tile.grown(HALO, size)
            around = latents.read(crop.top, crop.bottom)[..., crop.left : crop.right]
            decoded = decode_tile(vae, around, tile.within(crop))[0].float()
            blend.add(tile.scaled(f), decoded * weight.map())
    blend.finish()
    return picture


def _to_tensor(picture: Image.Image) -> Tensor:
    """``[1, 3, h, w]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def _enlarge(latents: Rows, guide: Rows) -> None:
    """Bicubic enlargement of the latents themselves, channel by channel."""
    source, size = latents.read(0, latents.height), (guide.height, guide.width)
    for channel in range(guide.channels):
        plane = F.interpolate(source[:, channel : channel + 1], size=size, mode="bicubic", antialias=False)
        guide.write_flat(channel * plane.numel(), plane.flatten())


def _encode(context: StageContext, streamer: Streamer, picture: Picture, guide: Rows) -> None:
    """Guide latents of the canvas: each crop is cut from the enlarged picture, which never exists as a whole."""
    config, progress = context.config, context.progress
    vae: Any = streamer.model
    f = factor(vae)
    across, down = picture.width / config.width, picture.height / config.height

    def read(box: Tile) -> Tensor:
        region = (box.left * across, box.top * down, box.right * across, box.bottom * down)
        return _to_tensor(picture.cut(region, (box.right - box.left, box.bottom - box.top)))

    side = config.guide.tile_size // f
    tiles = _tiles(Size(guide.height, guide.width), side)
    progress.start(len(tiles), "tiles")
    limit = (side + 2 * HALO) * f
    extent = (picture.width, picture.height)
    if max(extent) > limit:
        scale = limit / max(extent)
        extent = (max(f, round(picture.width * scale) // f * f), max(f, round(picture.height * scale) // f * f))
    statistics = encoder_statistics(vae, _to_tensor(picture.resized(extent)))
    with statistics.applied(vae):
        encode_tiled(vae, read, tiles, HALO, guide, done=progress.advance)
