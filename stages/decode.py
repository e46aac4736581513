"""The canvas to pixels: one file of 8-bit pixels a tile, so that a killed decode goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.context import StageContext
from stages.families.autoencoder import decode_call, exact_look, keys_bytes, rolling_look
from stages.families.looking import Looking, StageLook
from stages.families.opening import ENCODER, open_vae
from stages.files import atomic_path
from stages.memory.disk import SCRATCH
from stages.memory.planner import ModelProfile
from stages.memory.rows import Rows
from stages.memory.tensors import read_checked, write_tensors
from stages.models.loading import Streamer
from stages.models.tiny_vae import TINY, open_tiny, tiny_profile
from stages.preview import learn
from stages.tiles import Size, Tile, latent_grid
from stages.vae.exact_scratch import open_scratch
from stages.vae.exact_vae import exact_decode
from stages.vae.rolling_vae import decoder_statistics as small_decode
from stages.vae.rolling_vae import rolled_tiles, rolls
from stages.vae.shared import SharedStatistics
from stages.vae.tiled import decoded_tiles, decoder_statistics, to_uint8


def run(context: StageContext) -> None:
    """Write ``tiles/rXX_cYY.safetensors`` (``pixels`` uint8 ``[3, h, w]``, no halo; neighbours share the overlap)."""
    config, progress = context.config, context.progress
    factor = config.model.vae_scale_factor
    tiles = latent_grid(config.width, config.height, config.decode.tile_size, config.decode.overlap, factor)
    ranks = context.ranks()
    missing = [tile for tile in tiles if not _done(context, tile, tile.scaled(factor).size)]
    if len(missing) < len(tiles):
        progress.resumed(f"tile {len(tiles) - len(missing)} of {len(tiles)}")
    if config.decode.mode != "exact":
        progress.start(len(tiles), "tiles", len(tiles) - len(missing))
    canvas = Rows.open(context.inputs["denoise"] / "canvas.safetensors")
    halo = config.decode.halo // factor
    if config.decode.mode == "taesd":
        ranks.wait()  # until all know what is missing
        return _drafted(context, canvas, ranks.share(missing), halo)
    with open_vae(context, decoder=True) as streamer:
        vae: Any = streamer.model
        if config.decode.mode == "exact":
            return _exact(context, streamer, canvas, missing) if ranks.first else None
        statistics, rolled = None, config.decode.mode == "shared" and rolls(vae, config.device)
        with ranks.first_one_first():  # and all know what is missing before any of it is written
            if config.decode.mode == "shared":
                statistics = _statistics(context, streamer, canvas, config.decode.tile_size // factor + 2 * halo)
        parts: Iterator[tuple[Tile, Tensor]]
        if rolled and statistics:
            options = {"hold": streamer.hold, "mark": progress.mark}
            parts = rolled_tiles(vae, canvas, tiles, ranks.share(missing), statistics, **options)
        else:
            shown = decoded_tiles(vae, canvas, ranks.share(missing), halo, statistics)
            parts = ((tile, to_uint8(pixels)) for tile, pixels in shown)
        for tile, pixels in _written(context, parts):
            if tile == tiles[0]:
                learn(context, canvas.box(*tile[2:])[0], pixels)
    ranks.wait()


def _written(context: StageContext, parts: Iterable[tuple[Tile, Tensor]]) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles and their pixels, each when its file is there."""
    for tile, pixels in parts:
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"pixels": pixels}, checked=True)
        yield tile, pixels
        context.progress.advance()


def _drafted(context: StageContext, canvas: Rows, tiles: Sequence[Tile], halo: int) -> None:
    """By the tiny VAE."""
    with torch.inference_mode():
        vae = open_tiny(Path(context.config.preview.vae), str(context.config.device))
        context.progress.mark(TINY)
        shown = ((tile, to_uint8(pixels)) for tile, pixels in decoded_tiles(vae, canvas, tiles, halo))
        for _ in _written(context, shown):
            pass


def _done(context: StageContext, tile: Tile, size: Size) -> bool:
    """True where an earlier try left a whole tile; one that is damaged is named."""
    file = context.output / "tiles" / f"{tile.name}.safetensors"
    try:
        return read_checked(file)["pixels"].shape == (3, *size)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError) as error:
        context.progress.note(f"warning: {file.name} cannot be used ({error}); it is decoded again")
        return False


def _statistics(context: StageContext, streamer: Streamer, canvas: Rows, side: int) -> SharedStatistics:
    """What all rows or tiles share, of one small decode; kept so that a resumed decode uses the same numbers."""
    file = context.output / "checkpoint_statistics.safetensors"
    try:
        return SharedStatistics.load(file)
    except (OSError, ValueError, KeyError) as error:
        if file.exists():
            context.progress.note(f"warning: {file.name} cannot be used ({error}); it is made again")
    vae: Any = streamer.model
    if rolls(vae, context.config.device):
        options = {"hold": streamer.hold, "mark": context.progress.mark}
        statistics = small_decode(vae, canvas, side, context.output / f"{SCRATCH}_statistics", **options)
    else:
        statistics = decoder_statistics(vae, canvas, side)
    statistics.save(file)
    return statistics


def _exact(context: StageContext, streamer: Streamer, canvas: Rows, missing: list[Tile]) -> None:
    """The whole canvas layer by layer over scratch files, then cut into tiles.

    Raises:
        ValueError: the disk has less room than the scratch files need.
    """
    if not missing:
        return
    size = Size(canvas.height, canvas.width)
    scratch, options = open_scratch(context, streamer, "decode", size)
    pixels = exact_decode(streamer.model, canvas.read, size, scratch, **options)
    for tile in missing:
        box = tile.scaled(context.config.model.vae_scale_factor)
        with atomic_path(context.output / "tiles" / f"{tile.name}.safetensors") as temporary:
            write_tensors(temporary, {"pixels": pixels.box(*box[2:])[0]}, checked=True)
    pixels.remove()


def look(looking: Looking) -> StageLook:
    """A decoder over tiles, or layer by layer over the canvas."""
    config, f = looking.config, looking.config.model.vae_scale_factor
    size = Size(config.height // f, config.width // f)
    if config.decode.mode == "exact":
        return exact_look(looking, "decode", [("decode", size)])
    decode = config.decode
    if decode.mode == "shared":
        built = looking.built("vae", "decode", ENCODER)
        if rolls(built.network, config.device):
            return rolling_look(looking, built, [("decode", size)], (decode.tile_size + 2 * decode.halo) // f)
    tiles = latent_grid(config.width, config.height, decode.tile_size, decode.overlap, f)
    side = (decode.tile_size + 2 * decode.halo) // f
    height, width = min(side, size.height), min(side, size.width)
    if decode.mode == "taesd":
        tiny = tiny_profile(Path(config.preview.vae), config.model.latent_channels, Size(height, width), len(tiles))
        return StageLook((tiny,), extra=height * size.width * config.model.latent_channels * 4)
    call = decode_call(config, Size(height, width))
    measured = looking.measured(("decode", height, width), "vae", "decode", call, drop=ENCODER)
    rows = height * size.width * config.model.latent_channels * 4  # of latents that are in memory
    if decode.mode == "shared":
        rows += keys_bytes(looking, height * width)
    profile = ModelProfile(
        component="vae", micro_batch=1, micro_batches=len(tiles) + 1, steps=1, ordered=False, **measured._asdict()
    )
    return StageLook((profile,), extra=rows)
