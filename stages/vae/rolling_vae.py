"""Rolling decode and encode of a canvas, with the statistics of one exact pass over a small one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.memory.finite import refuse_absurd, refuse_not_finite
from stages.memory.planner import Cut, Line
from stages.memory.rows import Rows
from stages.tiles import Size, Tile, spread
from stages.vae.exact import ExactPass
from stages.vae.exact_program import Layer, Shape, program, shapes
from stages.vae.exact_size import cost, working_bytes
from stages.vae.exact_vae import Direction, given_shape
from stages.vae.rolling import RollingPass
from stages.vae.rolling_schedule import Schedule, columns
from stages.vae.shared import SharedStatistics
from stages.vae.tiled import factor, from_vae, small_canvas, to_uint8, to_vae

WIDEST = 272  # latents: what a row takes does not grow beyond, wider canvases are passed band by band
TALLEST = 512  # latents of a canvas whose steps are counted: a taller one has more of the same
Columns = tuple[int, int]


def rolls(vae: Any, device: str) -> bool:
    """Whether a canvas goes through this VAE so: on a CPU, where its blocks are known. A GPU takes tiles."""
    try:
        program(vae, "decode" if hasattr(vae, "decoder") else "encode")
    except ValueError:
        return False
    return str(device) == "cpu"


def small_statistics(vae: Any, direction: Direction, rows: Tensor, folder: Path, **options: Any) -> SharedStatistics:
    """Statistics of one exact pass over a small canvas.

    Args:
        vae: stock ``AutoencoderKL``.
        rows: what goes in, ``[1, C, h, w]`` float32.
        folder: for scratch files; it goes.
        options: of ``ExactPass``: ``hold``, ``mark``, ``device``.
    """
    layers, names, found = program(vae, direction), _names(vae), SharedStatistics()

    def keys(name: str, key: Tensor, value: Tensor) -> None:
        found.attentions[name] = key, value

    shutil.rmtree(folder, ignore_errors=True)  # of a pass that was killed
    given = Shape(rows.shape[1], Size(*rows.shape[2:]))
    steps = ExactPass(layers, given, folder, dtype=vae.dtype, keys=keys, **options)
    steps.run(lambda top, bottom: rows[:, :, top:bottom], lambda top, strip: None)
    for layer in layers:
        if layer.norm is not None:
            var, mean = steps.group_moments(layer)
            found.norms[names[layer.norm]] = var.float(), mean.float()
    shutil.rmtree(folder)
    return found


def decoder_statistics(vae: Any, latents: Rows, side: int, folder: Path, **options: Any) -> SharedStatistics:
    """Of the canvas ``latents`` at ``side`` latents; see ``small_statistics``."""
    return small_statistics(vae, "decode", to_vae(vae, small_canvas(latents, side)), folder, **options)


def _names(vae: Any) -> dict[nn.Module, str]:
    return {module: name for name, module in vae.named_modules()}


def _around(vae: Any, direction: Direction, size: Size, wanted: Columns) -> Columns:
    """Latents that those of ``wanted`` depend on, or whose pixels do."""
    f = factor(vae)
    decodes = direction == "decode"
    layers = program(vae, direction)
    found = shapes(layers, given_shape(vae, direction, size))
    left, right = columns(layers, found, *((edge * f for edge in wanted) if decodes else wanted))
    return (left, right) if decodes else (left // f, -(-right // f))


def bands(vae: Any, direction: Direction, size: Size) -> list[Columns]:
    """Columns of latents that go through the VAE together, from left to right; wide ones share what they depend on."""
    if size.width <= WIDEST:
        return [(0, size.width)]
    middle = size.width // 2
    left, right = _around(vae, direction, size, (middle, middle + 1))
    return spread(size.width, max(1, WIDEST - (right - left)), 0)


def _rolling(
    vae: Any, direction: Direction, size: Size, wanted: Columns, statistics: SharedStatistics, **options: Any
) -> tuple[RollingPass, Columns]:
    """The pass over the columns that ``wanted`` depends on, and these."""
    around = _around(vae, direction, size, wanted)
    given = given_shape(vae, direction, Size(size.height, around[1] - around[0]))
    layers = program(vae, direction)
    return RollingPass(layers, given, statistics, _names(vae), dtype=vae.dtype, **options), around


def decoded_rows(
    vae: Any, latents: Rows, wanted: Columns, statistics: SharedStatistics, first: int = 0, **options: Any
) -> Iterator[tuple[int, Tensor]]:
    """Pixels of some columns of a canvas, strip by strip: the first row, ``[1, 3, h, w * f]`` uint8.

    Args:
        vae: stock ``AutoencoderKL``.
        latents: of the canvas, in the denoiser's space.
        wanted: the columns, in latents.
        statistics: of ``decoder_statistics``.
        first: a row of pixels; it begins with the strip that this one lies in.
        options: of ``RollingPass``: ``hold``, ``mark``.
    """
    f, size = factor(vae), Size(latents.height, latents.width)
    steps, (left, right) = _rolling(vae, "decode", size, wanted, statistics, **options)

    def read(top: int, bottom: int) -> Tensor:
        rows = latents.box(top, left, bottom, right)
        refuse_absurd(rows, f"rows {top} to {bottom} of the VAE's decoder")
        return to_vae(vae, rows)

    for top, strip in steps.rows(read, first):
        pixels = strip[..., (wanted[0] - left) * f : (wanted[1] - left) * f]
        refuse_not_finite(pixels, f"row {top}: pixels of the VAE's decoder")
        yield top, to_uint8(pixels)


def decoded(vae: Any, latents: Rows, statistics: SharedStatistics, out: Rows, **options: Any) -> None:
    """All pixels of a canvas to ``out [1, 3, H, W]`` uint8; see ``decoded_rows``."""
    for wanted in bands(vae, "decode", Size(latents.height, latents.width)):
        for top, pixels in decoded_rows(vae, latents, wanted, statistics, **options):
            out.write_box(top, wanted[0] * factor(vae), pixels)


def rolled_tiles(
    vae: Any, latents: Rows, tiles: Sequence[Tile], wanted: Sequence[Tile], statistics: SharedStatistics, **options: Any
) -> Iterator[tuple[Tile, Tensor]]:
    """(tile, its pixels ``[3, h * f, w * f]`` uint8), a row of tiles after the other; see ``decoded_rows``.

    ``tiles`` are a grid, and ``wanted`` some of them: they have the same bits whichever these are.
    """
    f = factor(vae)
    for left, right in _tile_bands(vae, Size(latents.height, latents.width), tiles):
        waiting = sorted(tile for tile in wanted if left <= tile.left and tile.right <= right)
        if not waiting:
            continue
        begin = waiting[0].top * f
        held = torch.empty((3, 0, (right - left) * f), dtype=torch.uint8)
        for top, strip in decoded_rows(vae, latents, (left, right), statistics, begin, **options):
            begin = begin if held.shape[1] else top
            held = torch.cat([held, strip[0]], dim=1)
            while waiting and waiting[0].bottom * f <= begin + held.shape[1]:
                tile = waiting.pop(0)
                box = Tile(
                    0, 0, tile.top * f - begin, (tile.left - left) * f, tile.bottom * f - begin, (tile.right - left) * f
                )
                yield tile, held[box.index].contiguous()
            if not waiting:
                break
            gone = max(0, min(waiting[0].top * f - begin, held.shape[1]))
            held, begin = held[:, gone:].clone(), begin + gone


def _tile_bands(vae: Any, size: Size, tiles: Sequence[Tile]) -> list[Columns]:
    """Bands that hold whole columns of tiles, as many in each as ``WIDEST`` has room for."""
    spans = sorted({(tile.left, tile.right) for tile in tiles})
    found: list[Columns] = []
    for left, right in spans:
        if found:
            first, last = _around(vae, "decode", size, (found[-1][0], right))
            if last - first <= WIDEST:
                found[-1] = found[-1][0], right
                continue
        found.append((left, right))
    return found


class RollingEncode:
    """Encode a picture to the guide latents of a canvas.

    Args:
        vae: stock ``AutoencoderKL``.
        size: of the canvas, in latents.
        statistics: of ``small_statistics``.
        options: of ``RollingPass``: ``hold``, ``mark``.
    """

    def __init__(self, vae: Any, size: Size, statistics: SharedStatistics, **options: Any) -> None:
        self._vae, self._size, self._statistics, self._options = vae, size, statistics, options
        self._bands = bands(vae, "encode", size)
        self.boxes = [
            Tile(row, col, top, left, bottom, right)
            for col, (left, right) in enumerate(self._bands)
            for row, (top, bottom) in enumerate(pairwise(self._steps(col)[0].schedule.last_cuts))
        ]

    def _steps(self, col: int) -> tuple[RollingPass, Columns]:
        return _rolling(self._vae, "encode", self._size, self._bands[col], self._statistics, **self._options)

    def rows(self, read: Callable[[Tile], Tensor], done: int = 0) -> Iterator[tuple[Tile, Tensor]]:
        """(box, its latents ``[1, C, h, w]`` float32, in the denoiser's space) of all ``boxes`` but the first ``done``.

        ``read`` gives the pixels ``[1, 3, h, w]`` in [-1, 1] of a box in pixels.
        """
        f, channels = factor(self._vae), self._vae.config.latent_channels
        todo = self.boxes[done:]
        for col in dict.fromkeys(box.col for box in todo):
            boxes = [box for box in todo if box.col == col]
            steps, (left, right) = self._steps(col)

            def pixels(top: int, bottom: int, edges: Columns = (left * f, right * f)) -> Tensor:
                return read(Tile(0, 0, top, edges[0], bottom, edges[1]))

            for box, (top, strip) in zip(boxes, steps.rows(pixels, boxes[0].top), strict=True):
                moments = strip[:, :channels, :, box.left - left : box.right - left]
                latents = from_vae(self._vae, moments).cpu()
                refuse_not_finite(latents, f"row {top}: latents of the VAE's encoder")
                yield box, latents


def rolling_cut(vae: Any, direction: Direction, size: Size, side: int, itemsize: int) -> tuple[Cut, int]:
    """The passes over the small canvas (``side`` latents) and over the whole one as the planner's cut of a model, a
    unit a layer, and how often they use a weight; any device."""
    layers = program(vae, direction)
    whole = shapes(layers, given_shape(vae, direction, size))
    small = shapes(layers, given_shape(vae, direction, Size(*(min(side, length) for length in size))))
    seen = Size(min(size.height, TALLEST), min(size.width, WIDEST))
    schedule = Schedule(layers, shapes(layers, given_shape(vae, direction, seen)), itemsize)
    peaks, used = schedule.peaks(), max(1, schedule.pieces() * size.height * size.width // (seen.height * seen.width))
    weights = {layer.name: _weight(layer) * itemsize for layer in layers}
    return Cut(
        limit=max(weights.values()),
        order=tuple(layer.name for layer in layers),
        nbytes=weights,
        flops={layer.name: int(2 * _cost(layer, whole, small) / used) for layer in layers},
        lines=tuple(  # weights are held beside the ring, and repacked by the convolution
            Line(
                unit=layer.name,
                fixed=weights[layer.name] + max(peaks[layer.name], working_bytes(layer, small, itemsize)),
                slope=0,
                workspace=weights[layer.name],
            )
            for layer in layers
        ),
    ), used


def _weight(layer: Layer) -> int:
    return sum(parameter.numel() for owner in layer.owners for parameter in owner.parameters())


def _cost(layer: Layer, whole: dict[str, Shape], small: dict[str, Shape]) -> float:
    """Multiply-adds of both passes; on the whole canvas attention is to the keys of the small one."""
    if layer.attention is None:
        return cost(layer, whole) + cost(layer, small)
    (queries, keys), inner = ((found[layer.name].size for found in (whole, small)), layer.attention.inner_dim)
    projections, places = 4.0 * layer.channels * inner, queries.height * queries.width
    return places * (projections + 2.0 * keys.height * keys.width * inner) + cost(layer, small)
