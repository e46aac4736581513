"""Regions to views: which tile is asked about which prompt, and how much of its answer enters the canvas.

Every region's say is the product of a column and a row, and what a tile weighs is computed where it is needed: no
canvas of weights is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.canvas.mixture import View, grid_views
from stages.canvas.weights import GAUSSIAN_SIGMA, Weight, grid_weights, profile
from stages.ramps import ramp
from stages.regions.config import Region, Regions
from stages.tiles import Size, Tile, grid


def _box(region: Region, plan: Regions, size: Size) -> Tile:
    """The region's box on a canvas of ``size`` latents (the plan's own, or the low-res one); at least one latent."""
    down, across = size.height / plan.size.height, size.width / plan.size.width
    top, left = round(region.box.top * down), round(region.box.left * across)
    top, left = min(top, size.height - 1), min(left, size.width - 1)
    bottom, right = max(top + 1, round(region.box.bottom * down)), max(left + 1, round(region.box.right * across))
    return Tile(0, 0, top, left, bottom, right)


class Mask(NamedTuple):
    """A region's say over its box: ``scale`` times a column ``rows [h]`` and a row ``cols [w]``, float64."""

    scale: float
    rows: Tensor
    cols: Tensor

    def over(self, part: Tile) -> Tensor:
        """Of a part of the box, in its coordinates, ``[h, w]`` float64."""
        return self.scale * torch.outer(self.rows[part.top : part.bottom], self.cols[part.left : part.right])


def region_mask(region: Region, box: Tile, feather: float, size: Size) -> Mask:
    """The region's say over its box: its published density times its weight, or its feather.

    Densities (gaussian 15.9 in the middle, quartic 0.88, constant 1) are those of mixture-of-diffusers, so that
    regions of several kinds mix as they do there.
    """
    if region.mode == "replace":
        down = ramp(box.size.height, feather * (box.top > 0), feather * (box.bottom < size.height))
        across = ramp(box.size.width, feather * (box.left > 0), feather * (box.right < size.width))
        return Mask(1.0, torch.from_numpy(down), torch.from_numpy(across))
    density = 1 / (2 * torch.pi * GAUSSIAN_SIGMA**2) if region.mask_type == "gaussian" else 1.0
    return Mask(region.weight * density, *(profile(region.mask_type, side) for side in box.size))


def _grown(start: int, end: int, tile: int, length: int, step: int) -> tuple[int, int]:
    """The span, or a tile's length around it where it is shorter, inside the canvas, on multiples of ``step``."""
    start, end = start // step * step, -(-end // step) * step
    if end - start >= tile:
        return start, end
    start = min(max(0, (start + end - tile) // 2 // step * step), length - tile)
    return start, start + tile


def _crops(box: Tile, size: Size, side: Size, overlap: int, blend: str, step: int) -> Iterator[tuple[Tile, Weight]]:
    """Full-size tiles over a box, and each one's share of the part of the box that it decides.

    A box smaller than a tile is seen with what surrounds it: the denoiser knows its native size best. Crops lie on
    multiples of ``step``, around the box.
    """
    extent = Size(min(side.height, size.height), min(side.width, size.width))
    top, bottom = _grown(box.top, box.bottom, extent.height, size.height, step)
    left, right = _grown(box.left, box.right, extent.width, size.width, step)
    box = Tile(0, 0, top, left, bottom, right)
    tiles = grid(box.size, extent, min(overlap, min(extent) - 1), step)  # a canvas may be shorter than the overlap
    for tile, weight in zip(tiles, grid_weights(tiles, box.size, blend), strict=True):
        place = Tile(0, 0, tile.top + box.top, tile.left + box.left, tile.bottom + box.top, tile.right + box.left)
        yield place, weight


def region_views(
    plan: Regions, size: Size, *, side: Size, overlap: int, blend: str, guidance_scale: float, step: int = 1
) -> list[View]:
    """All views of a canvas of ``size`` latents: at every latent their weights add up to 1.

    Args:
        plan: regions in pixels; ``size`` may be the low-res canvas, to which their boxes are scaled.
        size: of the canvas in latents.
        side: of a tile, in latents.
        overlap: of tiles inside one region, in latents.
        blend: weight of tiles inside one region.
        guidance_scale: of the main prompt, and of regions that do not say theirs.
        step: tiles lie on multiples of it: latents that the denoiser joins to a token.
    """
    if not plan.regions:
        return grid_views(grid(size, side, overlap, step), size, blend=blend, guidance_scale=guidance_scale)
    shares, views = RegionShares(plan, size), []
    for row, region, box in shares.from_above():
        for tile, share in _crops(box, size, side, overlap, blend, step):
            weight = TileSay(shares, row, tile, share)
            if bool((weight() > 0).any()):
                rows, cols = (torch.ones(length, dtype=torch.float64) for length in tile.size)
                guidance = guidance_scale if region.guidance_scale is None else region.guidance_scale
                views.append(View(tile, Weight(rows, cols, weight), row + 1, guidance))
    return views[::-1]


class RegionShares:
    """What each region says about any part of a canvas of ``size`` latents: over all of them it adds up to 1."""

    def __init__(self, plan: Regions, size: Size) -> None:
        self._regions, scale = plan.regions, size.height / plan.size.height
        self._boxes = [_box(region, plan, size) for region in plan.regions]
        self._masks = [
            region_mask(region, box, region.feather * scale, size)
            for region, box in zip(plan.regions, self._boxes, strict=True)
        ]
        order = sorted(range(len(plan.regions)), key=lambda row: (plan.regions[row].mode == "replace", row))
        self._from_above = order[::-1]

    def from_above(self) -> Iterator[tuple[int, Region, Tile]]:
        """(row, region, its box), the one that lies on top first."""
        for row in self._from_above:
            yield row, self._regions[row], self._boxes[row]

    def _mask(self, row: int, part: Tile) -> Tensor:
        return self._masks[row].over(part.within(self._boxes[row]))

    def say(self, row: int, part: Tile) -> Tensor:
        """Of region ``row`` over ``part`` of the canvas, ``[h, w]`` float64."""
        found = torch.zeros(part.size, dtype=torch.float64)
        inner = _common(part, self._boxes[row])
        if inner is None:
            return found
        mask = self._mask(row, inner)
        if self._regions[row].mode == "blend":
            mask = mask / self._blended(inner)
        found[inner.within(part).slices] = mask * self._left(row, inner)
        return found

    def _blended(self, part: Tile) -> Tensor:
        """What the blending regions say together."""
        total = torch.zeros(part.size, dtype=torch.float64)
        for row, box in enumerate(self._boxes):
            inner = _common(part, box)
            if inner is not None and self._regions[row].mode == "blend":
                total[inner.within(part).slices] += self._mask(row, inner)
        return total

    def _left(self, row: int, part: Tile) -> Tensor:
        """What the replacing regions above ``row`` leave."""
        rest = torch.ones(part.size, dtype=torch.float64)
        for above in self._from_above[: self._from_above.index(row)]:
            inner = _common(part, self._boxes[above])
            if inner is not None and self._regions[above].mode == "replace":
                rest[inner.within(part).slices] *= 1 - self._mask(above, inner)
        return rest


def _common(part: Tile, box: Tile) -> Tile | None:
    """What both cover, None if nothing."""
    if not part.overlaps(box):
        return None
    top, left = max(part.top, box.top), max(part.left, box.left)
    return Tile(0, 0, top, left, min(part.bottom, box.bottom), min(part.right, box.right))


class TileSay(NamedTuple):
    """What a tile of region ``row`` weighs: the region's say there times the tile's share of it."""

    regions: RegionShares
    row: int
    tile: Tile
    share: Weight

    def __call__(self) -> Tensor:
        """``[h, w]`` float32."""
        return (self.regions.say(self.row, self.tile) * torch.outer(self.share.rows, self.share.cols)).float()
