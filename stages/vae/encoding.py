"""A picture as the guide latents of a canvas: a row of tiles after the other, or exactly; a killed try goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.context import StageContext
from stages.files import read_json, write_json
from stages.memory.disk import SCRATCH
from stages.memory.rows import Rows
from stages.memory.tensors import digest_of
from stages.picture.picture import Picture
from stages.tiles import Size, Tile
from stages.vae.exact_scratch import open_scratch
from stages.vae.exact_vae import exact_encode
from stages.vae.rolling_vae import RollingEncode, rolls, small_statistics
from stages.vae.tiled import HALO, encode_tiled, encoder_statistics, factor, guide_tiles


def _to_tensor(picture: Image.Image) -> Tensor:
    """``[1, 3, h, w]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def encode(context: StageContext, streamer: Any, picture: Picture, shape: tuple[int, int, int], folder: Path) -> Rows:
    """Guide latents of the canvas: each crop is cut from the enlarged picture, which never exists as a whole.

    A killed stage goes on with the row of tiles that it was in.

    Args:
        streamer: ``models.loading.Streamer`` of the VAE.
        picture: of any size, enlarged to the canvas by Lanczos.
        shape: ``(C, H/f, W/f)`` of the canvas' latents, float32.
        folder: for them, and for what is known of the rows that are done.
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
            context, streamer, lambda top, bottom: read(Tile(0, 0, top, 0, bottom, config.width)), shape, folder
        )
    side = config.guide.tile_size // f
    tiles = guide_tiles(Size(*shape[1:]), side)
    limit = (side + 2 * HALO) * f
    extent = (max(f, picture.width), max(f, picture.height))  # a pixel or two do not go through an encoder
    if max(extent) > limit:
        scale = limit / max(extent)
        extent = (max(f, round(picture.width * scale) // f * f), max(f, round(picture.height * scale) // f * f))
    shared, rolling = config.guide.vae_mode == "shared", None
    small = _to_tensor(picture.resized(extent)) if shared else None
    if small is not None and rolls(vae, config.device):
        options = {"hold": streamer.hold, "mark": progress.mark}
        statistics = small_statistics(vae, "encode", small, context.output / f"{SCRATCH}_statistics", **options)
        rolling = RollingEncode(vae, Size(*shape[1:]), statistics, **options)
        boxes = rolling.boxes
    else:
        tops = [0, *(tile.top for tile in tiles if tile.row and not tile.col), shape[1]]
        boxes = [Tile(row, 0, top, 0, bottom, shape[2]) for row, (top, bottom) in enumerate(pairwise(tops))]
    kept = _Kept(context, folder / "latents.safetensors", folder / "rows.json", shape, boxes)
    if rolling is not None:
        progress.start(len(boxes), "strips", kept.count)
        for box, latents in rolling.rows(read, kept.count):
            kept.guide.write_box(box.top, box.left, latents)
            kept.add(box)
            progress.advance()
        return kept.guide
    first = kept.count
    progress.start(len(tiles), "tiles", sum(tile.row < first - 1 for tile in tiles))
    statistics = encoder_statistics(vae, small) if small is not None else None
    with statistics.applied(vae) if statistics else nullcontext():

        def keep(row: int) -> None:
            if row > kept.count:  # the row before the first one is encoded again
                kept.add(boxes[row - 1])

        encode_tiled(vae, read, tiles, HALO, kept.guide, done=progress.advance, first=first, kept=keep)
    return kept.guide


class _Kept:
    """Latents in a file, and a mark that says which ``boxes`` of them are done, each by its digest.

    ``count``: how many an earlier try finished that are still what they were.
    """

    def __init__(
        self, context: StageContext, file: Path, mark: Path, shape: tuple[int, int, int], boxes: Sequence[Tile]
    ) -> None:
        self._mark, self._digests = mark, _kept(context, file, mark, shape, boxes)
        if self.count:
            self.guide = Rows.open(file)
            context.progress.resumed(f"row {self.count} of {len(boxes)}")
        else:
            mark.unlink(missing_ok=True)  # of a file that has been put in its place since
            self.guide = Rows.create(file, shape)

    @property
    def count(self) -> int:
        return len(self._digests)

    def add(self, box: Tile) -> None:
        """The next one is written."""
        self.guide.sync()
        self._digests.append(_digest(self.guide, box))
        write_json(self._mark, {"rows": self.count, "sha256": self._digests})


def _digest(guide: Rows, box: Tile) -> str:
    return digest_of({"rows": guide.box(*box[2:])})


def _kept(
    context: StageContext, file: Path, mark: Path, shape: tuple[int, int, int], boxes: Sequence[Tile]
) -> list[str]:
    """Digests of the boxes that an earlier try finished, those that are still what they were."""
    state = read_json(mark)
    kept = state.get("sha256") if isinstance(state, dict) else None
    if not isinstance(kept, list) or len(kept) > len(boxes) or not file.is_file():
        return []
    try:
        guide = Rows.open(file)
        if guide.shape != (1, *shape):
            raise ValueError(f"its shape is {guide.shape}")
        found = [_digest(guide, box) for box in boxes[: len(kept)]]
    except (OSError, ValueError, KeyError) as error:
        context.progress.note(f"warning: {file.name} cannot be used ({error}); the guide is made from the start")
        return []
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(found, kept, strict=True)))
    if len(same) < len(kept):
        context.progress.note(f"warning: row {len(same)} of {file.name} is damaged; it is encoded again")
    return kept[: len(same)]


def _encode_exactly(
    context: StageContext,
    streamer: Any,
    rows: Callable[[int, int], Tensor],
    shape: tuple[int, int, int],
    folder: Path,
) -> Rows:
    guide, size = Rows.create(folder / "latents.safetensors", shape), Size(*shape[1:])
    scratch, options = open_scratch(context, streamer, "encode", size)
    exact_encode(streamer.model, rows, size, scratch, guide.write, **options)
    guide.sync()
    return guide
