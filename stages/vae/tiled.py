"""The VAE tile by tile: stock ``AutoencoderKL`` calls on crops with a halo, alone or with shared statistics.

``independent`` is what diffusers' tiling does. ``shared`` takes the statistics of every GroupNorm, and the keys and
values of attention, from one small pass over the whole picture (``stages.vae.shared``). ``stages.vae.exact``
computes those of the whole canvas itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.canvas.weights import grid_weights
from stages.memory.finite import refuse_absurd, refuse_not_finite
from stages.memory.rows import Rows, std_mean
from stages.picture.row_blend import RowBlend
from stages.tiles import Size, Tile, grid, whole
from stages.vae.shared import SharedStatistics

HALO = 8  # latents of context around a tile of the guide


def to_vae(vae: Any, latents: Tensor) -> Tensor:
    """Latents of a canvas as the VAE's decoder takes them, float32 (as the diffusers pipelines do)."""
    config, scale = vae.config, getattr(vae.config, "scaling_factor", 1.0)
    latents = latents.float()
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
        return latents * std / scale + mean
    return latents / scale + (getattr(config, "shift_factor", None) or 0.0)


def from_vae(vae: Any, latents: Tensor) -> Tensor:
    """The reverse of ``to_vae``: what the encoder gives, as a canvas' latents, float32."""
    config, scale = vae.config, getattr(vae.config, "scaling_factor", 1.0)
    latents = latents.float()
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
        return (latents - mean) * scale / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * scale


def factor(vae: Any) -> int:
    """Pixels to a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def placed(vae: Any, tensor: Tensor) -> Tensor:
    """``tensor`` where the VAE computes and in its dtype; streamed weights wait on ``meta`` and compute on the CPU."""
    device = vae.device
    return tensor.to("cpu" if device.type == "meta" else device, vae.dtype)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255 as diffusers' ``VaeImageProcessor`` does."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def decode_tile(vae: Any, latents: Tensor, keep: Tile) -> Tensor:
    """Decode crops and cut their halo off.

    Args:
        vae: stock ``AutoencoderKL``.
        latents: ``[N, C, h, w]`` of the denoiser, halo included.
        keep: what is kept, in latents of the crop (``tile.within(tile.grown(halo, canvas))``).

    Returns:
        Pixels ``[N, 3, keep.height * f, keep.width * f]`` in [-1, 1] and in the VAE's dtype.

    Raises:
        ValueError: latents that are absurd, or pixels that are not finite.
    """
    refuse_absurd(latents, f"tile {keep.name} of the VAE's decoder")
    decoded = vae.decode(placed(vae, to_vae(vae, latents)), return_dict=False)[0]
    pixels = decoded[keep.scaled(factor(vae)).index].cpu()
    refuse_not_finite(pixels, f"tile {keep.name}: pixels of the VAE's decoder")
    return pixels


def decoded_tiles(
    vae: Any, latents: Rows, tiles: Sequence[Tile], halo: int, statistics: SharedStatistics | None = None
) -> Iterator[tuple[Tile, Tensor]]:
    """(tile, its pixels ``[3, h * f, w * f]`` in [-1, 1]), one after the other.

    Args:
        vae: stock ``AutoencoderKL``.
        latents: of the canvas, ``[1, C, H, W]``, in the denoiser's space.
        tiles: those that are wanted.
        halo: latents of context around each tile.
        statistics: that all of them share.
    """
    size = Size(latents.height, latents.width)
    for tile in tiles:
        crop = tile.grown(halo, size)
        around = latents.read(crop.top, crop.bottom)[..., crop.left : crop.right].contiguous()
        with statistics.applied(vae) if statistics else nullcontext():
            pixels = decode_tile(vae, around, tile.within(crop))[0]
        yield tile, pixels


def decode_tiled(vae: Any, latents: Rows, side: int, put: Callable[[int, Tensor], None], *, shared: bool) -> None:
    """A canvas' pixels, blended from tiles of ``side`` latents; from one tile if that is hardly larger.

    Args:
        vae, latents: as for ``decoded_tiles``.
        put: gets the pixels from the first row to the last: first row, ``[1, 3, h, W]`` uint8.
        shared: tiles have statistics in common.
    """
    size, f = Size(latents.height, latents.width), factor(vae)
    at_once = max(size) <= side + 2 * HALO
    tiles = [whole(size)] if at_once else guide_tiles(size, side)
    statistics = decoder_statistics(vae, latents, side + 2 * HALO) if shared and not at_once else None
    weights = grid_weights([tile.scaled(f) for tile in tiles], Size(size.height * f, size.width * f), "cosine")
    blend = RowBlend(3, size.width * f, lambda top, rows: put(top, to_uint8(rows)))
    for (tile, pixels), weight in zip(decoded_tiles(vae, latents, tiles, HALO, statistics), weights, strict=True):
        blend.add(tile.scaled(f), pixels.float() * weight.map())
    blend.finish()


def guide_tiles(size: Size, side: int) -> list[Tile]:
    """The grid of ``side`` latents that a guide is decoded and encoded in."""
    return grid(size, Size(side, side), min(4, side // 4))


def encode_tile(vae: Any, pixels: Tensor, keep: Tile) -> Tensor:
    """Encode crops to the posterior's mode and cut their halo off.

    Args:
        vae: stock ``AutoencoderKL``.
        pixels: ``[N, 3, h * f, w * f]`` in [-1, 1], halo included.
        keep: what is kept, in latents of the crop.

    Returns:
        ``[N, C, keep.height, keep.width]`` float32, in the denoiser's space.
    """
    posterior = vae.encode(placed(vae, pixels), return_dict=False)[0]
    latents = from_vae(vae, posterior.mode()[keep.index])
    refuse_not_finite(latents, f"tile {keep.name}: latents of the VAE's encoder")
    return latents


def encode_tiled(
    vae: Any,
    read: Callable[[Tile], Tensor],
    tiles: Sequence[Tile],
    halo: int,
    out: Rows,
    *,
    done: Callable[[], None] = lambda: None,
    first: int = 0,
    kept: Callable[[int], None] = lambda row: None,
) -> None:
    """A picture's latents, one crop at a time.

    Args:
        vae: stock ``AutoencoderKL``.
        read: gives the pixels ``[1, 3, h, w]`` in [-1, 1] of a box in pixels.
        tiles: a grid of the canvas, whose overlaps are blended.
        halo: latents of context around each tile.
        out: where the latents go, ``[1, C, H, W]`` float32; in the denoiser's space.
        done: called after each tile.
        first: the row of tiles before which ``out`` is complete, from an earlier try.
        kept: told every row of tiles before which ``out`` is complete now.
    """
    size, finished = Size(out.height, out.width), next((tile.top for tile in tiles if tile.row == first), 0)
    blend = RowBlend(out.channels, out.width, lambda top, rows: out.write(top, rows) if top >= finished else None)
    row = max(0, first - 1)  # its tiles reach into the next row's: they are encoded again
    for tile, weight in zip(tiles, grid_weights(tiles, size, "cosine"), strict=True):
        if tile.row < row:
            continue
        if tile.row > row:
            row = tile.row
            blend.complete(tile.top)
            kept(row)
        crop = tile.grown(halo, size)
        encoded = encode_tile(vae, read(crop.scaled(factor(vae))), tile.within(crop)).to("cpu")
        blend.add(tile, encoded[0] * weight.map())
        done()
    blend.finish()


def small_canvas(latents: Rows, side: int) -> Tensor:
    """The canvas at most ``side`` latents long, each channel with the canvas' own mean and deviation.

    Picked (nearest-exact), not averaged: averaging would make latents that no picture has.
    """
    height, width = latents.height, latents.width
    scale = min(1.0, side / max(height, width))
    if scale == 1.0:
        return latents.read(0, height)
    down, across = (_picked(length, max(1, round(length * scale))) for length in (height, width))
    small = torch.cat([latents.read(y, y + 1)[..., across] for y in down], dim=2)
    std, mean = std_mean(latents)
    small_std, small_mean = torch.std_mean(small, dim=(-2, -1), keepdim=True)
    return (small - small_mean) / small_std.clamp_min(1e-6) * std + mean


def _picked(length: int, count: int) -> list[int]:
    """The ``count`` places of an axis that nearest-exact interpolation takes."""
    places = torch.arange(length, dtype=torch.float64).view(1, 1, -1)
    return F.interpolate(places, size=count, mode="nearest-exact").flatten().long().tolist()


def decoder_statistics(vae: Any, latents: Rows, side: int) -> SharedStatistics:
    """Statistics for ``shared`` decoding: of one decode of the canvas ``latents [1, C, H, W]`` at ``side`` latents."""
    statistics = SharedStatistics()
    with statistics.collect(vae):
        vae.decode(placed(vae, to_vae(vae, small_canvas(latents, side))), return_dict=False)
    return statistics


def encoder_statistics(vae: Any, pixels: Tensor) -> SharedStatistics:
    """Statistics for ``shared`` encoding: of the picture at a small size, ``[1, 3, h, w]`` in [-1, 1]."""
    statistics = SharedStatistics()
    with statistics.collect(vae):
        vae.encode(placed(vae, pixels), return_dict=False)
    return statistics
