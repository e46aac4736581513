"""The guide: the low-res picture (or the user's own) enlarged to the canvas, and encoded again tile by tile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from stages.canvas.tiles import Size, Tile, grid, whole
from stages.canvas.vae import decode_tile, decoder_statistics, encode_tiled, encoder_statistics, factor, to_uint8
from stages.canvas.weights import grid_weights
from stages.config import ConfigError
from stages.context import StageContext
from stages.memory.tensors import read_tensors, write_tensors
from stages.models.loading import Streamer
from stages.models.vae import open_vae
from stages.workflow.store import atomic_path

HALO = 8  # latents of context around a tile, decoding and encoding


def run(context: StageContext) -> None:
    """Write ``lowres.png`` (the preview) and ``latents.safetensors`` (``[1, C, H/f, W/f]`` float32)."""
    config, progress = context.config, context.progress
    f = config.model.vae_scale_factor
    size = Size(config.height // f, config.width // f)
    in_pixels = config.guide.image or config.guide.upscale == "lanczos"
    plan = context.plan
    halves = {"encoder": bool(in_pixels), "decoder": not config.guide.image}
    with open_vae(config, plan=plan, **halves, note=progress.note, mark=progress.mark) as streamer:
        latents = None
        if config.guide.image:
            picture = open_picture(Path(config.guide.image))
            _preview(context, picture.resize((config.lowres.width, config.lowres.height), Image.Resampling.LANCZOS))
        else:
            latents = _source(context)
            picture = _decode(streamer, latents, config.guide.tile_size // f)
            _preview(context, picture)
        if latents is not None and latents.shape[-2:] == tuple(size):
            progress.start(1, "tiles")
            guide = latents  # the canvas is as large as the low-res picture: nothing to enlarge
            progress.advance()
        elif in_pixels:
            guide = _encode(context, streamer, picture, size)
        else:
            assert latents is not None
            progress.start(1, "tiles")
            guide = F.interpolate(latents, size=tuple(size), mode="bicubic", antialias=False)
            progress.advance()
    with atomic_path(context.output / "latents.safetensors") as temporary:
        write_tensors(temporary, {"latents": guide})


def _source(context: StageContext) -> Tensor:
    """The latents to enlarge: of the low-res picture, or of the canvas of the upscaling phase before this one."""
    if "lowres" in context.inputs:
        return read_tensors(context.inputs["lowres"] / "latents.safetensors")["latents"]
    return read_tensors(context.input("denoise") / "canvas.safetensors")["latents"]


def open_picture(path: Path) -> Image.Image:
    """The user's picture as 8-bit RGB, turned as its EXIF says. ConfigError if it is none."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return picture.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow says either of broken files
        raise ConfigError("guide.image", str(path), "a picture that Pillow can read", f"It says: {error}") from error


def _preview(context: StageContext, picture: Image.Image) -> None:
    """``lowres.png``, and in a later upscaling phase ``previous.png``: the picture that it enlarges."""
    name = "lowres.png"
    if any(stage.startswith("guide") for stage in context.inputs):
        with atomic_path(context.output / name) as temporary:
            shutil.copyfile(context.input("guide") / name, temporary)
        name = "previous.png"
    with atomic_path(context.output / name) as temporary:
        picture.save(temporary, format="PNG")
    context.progress.note(f"preview: {context.run_dir / context.name / name}")


def _tiles(size: Size, side: int) -> list[Tile]:
    return grid(size, Size(side, side), min(4, side // 4))


def _decode(streamer: Streamer, latents: Tensor, side: int) -> Image.Image:
    """The low-res picture; in tiles with shared statistics if it is larger than one."""
    vae: Any = streamer.model
    size = Size(latents.shape[-2], latents.shape[-1])
    if max(size) <= side + 2 * HALO:
        pixels = decode_tile(vae, latents, whole(size))[0].float()
    else:
        statistics = decoder_statistics(vae, latents, side + 2 * HALO)
        f = factor(vae)
        pixels = torch.zeros((3, size.height * f, size.width * f))
        tiles = _tiles(size, side)
        weights = grid_weights([tile.scaled(f) for tile in tiles], Size(size.height * f, size.width * f), "cosine")
        with statistics.applied(vae):
            for tile, weight in zip(tiles, weights, strict=True):
                crop = tile.grown(HALO, size)
                decoded = decode_tile(vae, latents[crop.index], tile.within(crop))[0].float()
                pixels[tile.scaled(f).index] += decoded * weight.map()
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    """``[1, 3, h, w]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def _encode(context: StageContext, streamer: Streamer, picture: Image.Image, size: Size) -> Tensor:
    """Guide latents of the canvas: each crop is cut from the enlarged picture, which never exists as a whole."""
    config, progress = context.config, context.progress
    vae: Any = streamer.model
    f = factor(vae)
    across, down = picture.width / config.width, picture.height / config.height

    def read(box: Tile) -> Tensor:
        # Pillow's box is the exact sub-pixel region; its Lanczos window reaches beyond it into the picture
        region = (box.left * across, box.top * down, box.right * across, box.bottom * down)
        extent = (box.right - box.left, box.bottom - box.top)
        return _to_tensor(picture.resize(extent, Image.Resampling.LANCZOS, box=region))

    side = config.guide.tile_size // f
    tiles = _tiles(size, side)
    progress.start(len(tiles), "tiles")
    small = picture
    limit = (side + 2 * HALO) * f
    if max(picture.size) > limit:
        scale = limit / max(picture.size)
        extent = [max(f, round(length * scale) // f * f) for length in picture.size]
        small = picture.resize(extent, Image.Resampling.LANCZOS)
    statistics = encoder_statistics(vae, _to_tensor(small))
    with statistics.applied(vae):
        return encode_tiled(vae, read, size, tiles, HALO, done=progress.advance)
