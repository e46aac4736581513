"""How visible tile borders are: the gradient across them against the gradient elsewhere. numpy and Pillow only.

A picture is read once, in row bands, so its size does not matter.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from stages.canvas.tiles import Size, Tile

BLOCK = 64  # pixels: borders are judged in pieces of this length
NEAR = 16  # pixels to both sides that a border is compared with


class Border(NamedTuple):
    """One line of tile borders, between ``position - 1`` and ``position``; gradients in 8-bit levels."""

    axis: Literal["column", "row"]
    position: int
    gradient: float  # mean step across the border
    nearby: float  # mean step of the lines within NEAR pixels
    ratio: float
    worst: float  # highest ratio of a piece of BLOCK pixels


class SeamReport(NamedTuple):
    """``ratio``: mean gradient across borders / elsewhere; ``local_ratio``: / near the borders (1: no seam).

    The first is what is usually reported; the second does not mind what the picture shows where the borders are.
    """

    ratio: float
    local_ratio: float
    borders: tuple[Border, ...]
    columns: np.ndarray  # [H / BLOCK, W - 1] mean step between columns
    rows: np.ndarray  # [H - 1, W / BLOCK] mean step between rows
    size: Size


def border_positions(tiles: Sequence[Tile], size: Size) -> tuple[list[int], list[int]]:
    """(x of vertical, y of horizontal) borders: every edge of a tile inside the canvas, where its weight ends."""
    columns = {edge for tile in tiles for edge in (tile.left, tile.right)} - {0, size.width}
    rows = {edge for tile in tiles for edge in (tile.top, tile.bottom)} - {0, size.height}
    return sorted(columns), sorted(rows)


def picture_bands(path: Path, height: int = 256) -> Iterator[np.ndarray]:
    """A picture file in bands ``[h, W, 3]`` uint8. Pillow holds the whole of it; for huge ones use ``Bands``."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        for top in range(0, image.height, height):
            yield np.asarray(image.crop((0, top, image.width, min(top + height, image.height))))


def gradients(bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, Size]:
    """(columns, rows, size) as in ``SeamReport``, from bands ``[h, W, 3]`` uint8 in order, of any heights."""
    across: list[np.ndarray] = []
    down: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    last: np.ndarray | None = None
    height = width = 0
    for band in bands:
        grey = band.astype(np.float32).mean(axis=2)
        width = grey.shape[1]
        starts = np.arange(0, width, BLOCK)
        above = grey[:-1] if last is None else np.concatenate([last, grey[:-1]])
        below = grey[1:] if last is None else grey
        down.append(np.add.reduceat(np.abs(below - above), starts, axis=1) / np.diff([*starts, width]))
        last = grey[-1:]
        for row in np.abs(np.diff(grey, axis=1)):
            waiting.append(row)
            if len(waiting) == BLOCK:
                across.append(np.mean(waiting, axis=0))
                waiting.clear()
        height += len(grey)
    if waiting:
        across.append(np.mean(waiting, axis=0))
    return np.array(across), np.concatenate(down), Size(height, width)


def _border(axis: Literal["column", "row"], position: int, steps: np.ndarray, borders: set[int]) -> Border:
    """``steps [pieces, positions - 1]``: the step before position p is entry p - 1."""
    near = range(max(1, position - NEAR), min(steps.shape[1], position + NEAR) + 1)
    beside = [p - 1 for p in near if all(abs(p - border) > 1 for border in borders)]
    here = steps[:, position - 1]
    around = steps[:, beside].mean(axis=1) if beside else np.full_like(here, np.nan)
    worst = float(np.max(here / np.maximum(around, 0.25)))  # a quarter of a level: flat sky has no steps at all
    gradient, nearby = float(here.mean()), float(around.mean())
    return Border(axis, position, gradient, nearby, _ratio(gradient, nearby), worst)


def _ratio(gradient: float, reference: float) -> float:
    return gradient / reference if reference > 0 else (1.0 if gradient == 0 else float("inf"))


def measure(bands: Iterable[np.ndarray], tiles: Sequence[Tile]) -> SeamReport:
    """Judge the borders of ``tiles`` (pixels) in a picture given as row bands.

    Raises:
        ValueError: the picture is not as large as the tiles, or there is no border in it.
    """
    columns, rows, size = gradients(bands)
    extent = Size(max(tile.bottom for tile in tiles), max(tile.right for tile in tiles))
    if size != extent:
        raise ValueError(f"the picture is {size.width}x{size.height}, its tiles cover {extent.width}x{extent.height}.")
    xs, ys = border_positions(tiles, size)
    if not xs and not ys:
        raise ValueError("one tile covers the picture: there is no border to judge.")
    borders = [_border("column", x, columns, set(xs)) for x in xs] + [_border("row", y, rows.T, set(ys)) for y in ys]
    on_x, on_y = np.zeros(columns.shape[1], bool), np.zeros(rows.shape[0], bool)
    on_x[[x - 1 for x in xs]], on_y[[y - 1 for y in ys]] = True, True
    across, down = columns.mean(axis=0), rows.mean(axis=1)
    at = np.concatenate([across[on_x], down[on_y]])
    # a picture changes differently across and down: 'elsewhere' has the borders' share of both
    elsewhere = np.concatenate([np.full(len(xs), across[~on_x].mean()), np.full(len(ys), down[~on_y].mean())])
    nearby = [border.nearby for border in borders]
    return SeamReport(
        ratio=_ratio(float(at.mean()), float(elsewhere.mean())),
        local_ratio=_ratio(float(at.mean()), float(np.mean(nearby))),
        borders=tuple(borders),
        columns=columns,
        rows=rows,
        size=size,
    )


def table(report: SeamReport, most: int = 20) -> str:
    """The borders with the highest ratios, as a Markdown table."""
    lines = ["| border | at | gradient | nearby | ratio | worst piece |", "|---|---|---|---|---|---|"]
    for border in sorted(report.borders, key=lambda b: -b.ratio)[:most]:
        values = f"{border.gradient:.2f} | {border.nearby:.2f} | {border.ratio:.3f} | {border.worst:.2f}"
        lines.append(f"| {border.axis} | {border.position} | {values} |")
    return "\n".join(lines)


def heat_map(report: SeamReport, side: int = 768) -> bytes:
    """A PNG: the picture's gradients in grey, and every border in pieces from blue (no step) over white to red (2x)."""
    scale = side / max(report.size)
    extent = (max(1, round(report.size.width * scale)), max(1, round(report.size.height * scale)))
    texture = np.minimum(255, np.sqrt(report.columns) * 40).astype(np.uint8)
    picture = np.array(Image.fromarray(texture).resize(extent).convert("RGB")) // 3
    for border in report.borders:
        steps = report.columns if border.axis == "column" else report.rows.T
        pieces = steps[:, border.position - 1] / max(border.nearby, 0.25)
        line = _colors(
            np.interp(
                np.linspace(0, 1, extent[1 if border.axis == "column" else 0]), np.linspace(0, 1, len(pieces)), pieces
            )
        )
        at = min(round(border.position * scale), (extent[0] if border.axis == "column" else extent[1]) - 1)
        if border.axis == "column":
            picture[:, at] = line
        else:
            picture[at] = line
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _colors(ratios: np.ndarray) -> np.ndarray:
    """``[n, 3]`` uint8: blue at 0, white at 1, red from 2 on."""
    high, low = np.clip(ratios - 1, 0, 1), np.clip(1 - ratios, 0, 1)
    return np.stack([255 * (1 - low), 255 * (1 - high - low), 255 * (1 - high)], axis=-1).clip(0, 255).astype(np.uint8)


def psnr(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float:
    """Peak signal to noise ratio in dB of two 8-bit pictures in bands of the same heights; infinite if equal."""
    error, count = 0.0, 0
    for a, b in zip(one, other, strict=True):
        error += float(((a.astype(np.float64) - b) ** 2).sum())
        count += a.size
    return float("inf") if error == 0 else float(10 * np.log10(255**2 * count / error))
