"""How visible tile borders are: the gradient across them against the gradient elsewhere. numpy and Pillow only.

A picture is read once, in strips, and only sums are kept, so its size does not matter; ``seam_map`` draws them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from stages.tiles import Size, Tile

BLOCK, PIECES = 64, 128  # borders are judged in pieces of 64 pixels, or as many as make 128 pieces of the longer side
NEAR = 16  # pixels to both sides that a border is compared with
NEAR_LATENTS = 4  # latents to both sides, of which it is compared with the lines of its own phase


class Border(NamedTuple):
    """One line of tile borders, between ``position - 1`` and ``position``; gradients in 8-bit levels."""

    axis: Literal["column", "row"]
    position: int
    gradient: float  # mean step across the border
    nearby: float  # mean step of the lines within NEAR pixels
    aligned: float  # mean step of the lines nearby that lie between two latents, as every border does
    ratio: float  # gradient / nearby
    worst: float  # highest ratio of a piece
    pieces: np.ndarray  # ratio of each piece of it; a quarter of a level is added to both: flat sky has no steps at all


class Gradients(NamedTuple):
    """Mean steps between neighbouring pixels in 8-bit levels, over pieces of ``block`` pixels."""

    columns: np.ndarray  # [H / block, W - 1] between columns
    rows: np.ndarray  # [H - 1, W / block] between rows
    size: Size
    block: int


class SeamReport(NamedTuple):
    """``ratio``: mean gradient across borders / elsewhere; ``local_ratio``: / near the borders; ``lattice_ratio``: /
    the lines near the borders that lie between two latents as well. No seam: 1.

    The first is what is usually reported; the second does not mind what the picture shows where the borders are; the
    third does not mind either that a VAE's decoder makes steeper steps between latents, with tiles or without.
    """

    ratio: float
    local_ratio: float
    lattice_ratio: float
    borders: tuple[Border, ...]
    gradients: Gradients


def border_positions(tiles: Sequence[Tile], size: Size) -> tuple[list[int], list[int]]:
    """(x of vertical, y of horizontal) borders: every edge of a tile inside the canvas, where its weight ends."""
    columns = {edge for tile in tiles for edge in (tile.left, tile.right)} - {0, size.width}
    rows = {edge for tile in tiles for edge in (tile.top, tile.bottom)} - {0, size.height}
    return sorted(columns), sorted(rows)


def picture_strips(path: Path, height: int = 256) -> Iterator[np.ndarray]:
    """A picture file in strips ``[h, W, 3]`` uint8. Pillow holds the whole of it; for huge ones use ``TileStrips``."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        for top in range(0, image.height, height):
            yield np.asarray(image.crop((0, top, image.width, min(top + height, image.height))))


class Meter:
    """Sums the steps of a picture of ``size`` that comes in strips; whole numbers: any strips give the same."""

    def __init__(self, size: Size) -> None:
        self.size, self._top = size, 0
        self.block = max(BLOCK, -(-max(size) // PIECES))
        self._starts = np.arange(0, size.width, self.block)
        self._across = np.zeros((-(-size.height // self.block), size.width - 1), np.int64)
        self._down = np.zeros((size.height - 1, len(self._starts)), np.int32)
        self._last: np.ndarray | None = None

    def add(self, strip: np.ndarray) -> None:
        """The next rows, ``[h, W, 3]`` uint8."""
        light = strip[..., 0].astype(np.int16) + strip[..., 1] + strip[..., 2]
        steps, top = np.abs(light[:, 1:] - light[:, :-1]), self._top
        for piece in range(top // self.block, -(-(top + len(strip)) // self.block)):
            rows = steps[max(0, piece * self.block - top) : (piece + 1) * self.block - top]
            self._across[piece] += rows.sum(axis=0, dtype=np.int32)
        if self._last is not None:
            light, top = np.concatenate([self._last, light]), top - 1
        if len(light) > 1:
            down = np.abs(light[1:] - light[:-1])
            self._down[top : top + len(down)] = np.add.reduceat(down, self._starts, axis=1, dtype=np.int32)
        self._last, self._top = light[-1:], self._top + len(strip)

    def gradients(self) -> Gradients:
        """When all rows have come. ValueError if not."""
        if self._top != self.size.height:
            raise ValueError(f"{self._top} rows of a picture of {self.size.height}.")
        heights = np.diff([*range(0, self.size.height, self.block), self.size.height])
        columns = self._across / (3.0 * heights[:, None])
        rows = self._down / (3.0 * np.diff(np.append(self._starts, self.size.width)))
        return Gradients(columns.astype(np.float32), rows.astype(np.float32), self.size, self.block)


def measure(strips: Iterable[np.ndarray], tiles: Sequence[Tile], factor: int = 8) -> SeamReport:
    """Judge the borders of ``tiles`` (pixels) in a picture given as row strips ``[h, W, 3]`` uint8, in order.

    Raises:
        ValueError: the picture is not as large as the tiles, or there is no border in it.
    """
    extent = Size(max(tile.bottom for tile in tiles), max(tile.right for tile in tiles))
    meter, rows = Meter(extent), 0
    for strip in strips:
        if strip.shape[1] != extent.width or rows + len(strip) > extent.height:
            raise ValueError(f"the picture is not {extent.width}x{extent.height}, as its tiles are.")
        meter.add(strip)
        rows += len(strip)
    if rows != extent.height:
        raise ValueError(f"the picture is {extent.width}x{rows}, its tiles cover {extent.width}x{extent.height}.")
    return judge(meter.gradients(), tiles, factor)


def judge(gradients: Gradients, tiles: Sequence[Tile], factor: int = 8) -> SeamReport:
    """Judge the borders of ``tiles`` (pixels), ``factor`` pixels to a latent.

    Raises:
        ValueError: one tile covers the picture.
    """
    columns, rows, size, _ = gradients
    xs, ys = border_positions(tiles, size)
    if not xs and not ys:
        raise ValueError("one tile covers the picture: there is no border to judge.")
    borders = [
        *(_border("column", x, columns, set(xs), factor) for x in xs),
        *(_border("row", y, rows.T, set(ys), factor) for y in ys),
    ]
    on_x, on_y = np.zeros(columns.shape[1], bool), np.zeros(rows.shape[0], bool)
    on_x[[x - 1 for x in xs]], on_y[[y - 1 for y in ys]] = True, True
    across, down = columns.mean(axis=0), rows.mean(axis=1)
    at = float(np.concatenate([across[on_x], down[on_y]]).mean())
    # a picture changes differently across and down: 'elsewhere' has the borders' share of both
    elsewhere = np.concatenate([np.full(len(xs), across[~on_x].mean()), np.full(len(ys), down[~on_y].mean())])
    return SeamReport(
        ratio=_ratio(at, float(elsewhere.mean())),
        local_ratio=_ratio(at, float(np.mean([border.nearby for border in borders]))),
        lattice_ratio=_ratio(at, float(np.mean([border.aligned for border in borders]))),
        borders=tuple(borders),
        gradients=gradients,
    )


def _border(axis: Literal["column", "row"], position: int, steps: np.ndarray, borders: set[int], factor: int) -> Border:
    """``steps [pieces, positions - 1]``: the step before position p is entry p - 1."""
    reach = max(NEAR, NEAR_LATENTS * factor)
    around_it = range(max(1, position - reach), min(steps.shape[1], position + reach) + 1)
    free = [p for p in around_it if not {p - 1, p, p + 1} & borders]
    beside = [p - 1 for p in free if abs(p - position) <= NEAR]
    alike = [p - 1 for p in free if p % factor == position % factor and abs(p - position) <= NEAR_LATENTS * factor]
    here = steps[:, position - 1]
    around = steps[:, beside].mean(axis=1) if beside else np.full_like(here, np.nan)
    pieces = (here + 0.25) / (around + 0.25)
    gradient, nearby = float(here.mean()), float(around.mean())
    aligned = float(steps[:, alike].mean()) if alike else nearby
    return Border(axis, position, gradient, nearby, aligned, _ratio(gradient, nearby), float(pieces.max()), pieces)


ALONE = 1000.0  # the ratio of a step where there is none around it: JSON has no infinity


def _ratio(gradient: float, reference: float) -> float:
    return gradient / reference if reference > 0 else (1.0 if gradient == 0 else ALONE)


def psnr(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float:
    """Peak signal to noise ratio in dB of two 8-bit pictures in strips of the same heights; infinite if equal."""
    error, count = 0.0, 0
    for a, b in zip(one, other, strict=True):
        error += float(((a.astype(np.float64) - b) ** 2).sum())
        count += a.size
    return float("inf") if error == 0 else float(10 * np.log10(255**2 * count / error))
