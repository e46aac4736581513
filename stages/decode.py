"""The canvas to pixels: one file of 8-bit pixels a tile, so that a killed decode goes on where it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stages.canvas.groupnorm import GroupNormStatistics
from stages.canvas.tiles import Size, Tile, latent_grid
from stages.canvas.vae import decode_tile, decoder_statistics, to_uint8
from stages.context import StageContext
from stages.memory.tensors import TensorRef, read_header, read_rows, read_tensor, write_tensors
from stages.models.vae import open_vae
from stages.workflow.store import atomic_path


def run(context: StageContext) -> None:
    """Write ``tiles/rXX_cYY.safetensors`` (``pixels`` uint8 ``[3, h, w]``, no halo; neighbours share the overlap)."""
    config, progress = context.config, context.progress
    factor = config.model.vae_scale_factor
    size = Size(config.height // factor, config.width // factor)
    tiles = latent_grid(config.width, config.height, config.decode.tile_size, config.decode.overlap, factor)
    folder = context.output / "tiles"
    missing = [tile for tile in tiles if not (folder / f"{tile.name}.safetensors").is_file()]
    if 0 < len(missing) < len(tiles):
        progress.resumed(f"tile {len(tiles) - len(missing)} of {len(tiles)}")
    progress.start(len(tiles), "tiles", len(tiles) - len(missing))
    canvas = read_header(context.inputs["denoise"] / "canvas.safetensors")["latents"]
    halo = config.decode.halo // factor
    with open_vae(config, plan=context.plan, decoder=True, note=progress.note, mark=progress.mark) as streamer:
        vae: Any = streamer.model
        statistics = None
        if config.decode.mode == "shared":
            statistics = _statistics(context, vae, canvas, config.decode.tile_size // factor + 2 * halo)
        for tile in missing:
            crop = tile.grown(halo, size)
            latents = _crop(canvas, crop)
            if statistics is None:
                pixels = decode_tile(vae, latents, tile.within(crop))
            else:
                with statistics.applied(vae):
                    pixels = decode_tile(vae, latents, tile.within(crop))
            with atomic_path(folder / f"{tile.name}.safetensors") as temporary:
                write_tensors(temporary, {"pixels": to_uint8(pixels)[0]})
            progress.advance()


def _crop(canvas: TensorRef, box: Tile) -> Tensor:
    return read_rows(canvas, box.top, box.bottom)[..., box.left : box.right].contiguous()


def _statistics(context: StageContext, vae: Any, canvas: TensorRef, side: int) -> GroupNormStatistics:
    """GroupNorm statistics of one small decode, kept so that a resumed decode uses the same numbers."""
    file = context.output / "checkpoint_statistics.safetensors"
    if not file.is_file():
        decoder_statistics(vae, read_tensor(canvas), side).save(file)
    return GroupNormStatistics.load(file)
