"""Regions to views: which tile is asked about which prompt, and how much of its answer enters the canvas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stages.canvas.mixture import View, grid_views
from stages.canvas.regions import Region, RegionPlan
from stages.canvas.tiles import Size, Tile, grid
from stages.canvas.weights import GAUSSIAN_SIGMA, Weight, grid_weights, profile


def _box(region: Region, plan: RegionPlan, size: Size) -> Tile:
    """The region's box on a canvas of ``size`` latents (the plan's own, or the low-res one); at least one latent."""
    down, across = size.height / plan.size.height, size.width / plan.size.width
    top, left = round(region.box.top * down), round(region.box.left * across)
    top, left = min(top, size.height - 1), min(left, size.width - 1)
    bottom, right = max(top + 1, round(region.box.bottom * down)), max(left + 1, round(region.box.right * across))
    return Tile(0, 0, top, left, bottom, right)


def region_mask(region: Region, box: Tile, feather: float, size: Size) -> Tensor:
    """The region's say over its box, ``[h, w]`` float64: its published density times its weight, or its feather.

    Densities (gaussian 15.9 in the middle, quartic 0.88, constant 1) are those of mixture-of-diffusers, so that
    regions of several kinds mix as they do there.
    """
    if region.mode == "replace":
        down = _ramp(box.size.height, feather, box.top > 0, box.bottom < size.height)
        across = _ramp(box.size.width, feather, box.left > 0, box.right < size.width)
        return torch.outer(down, across)
    density = 1 / (2 * torch.pi * GAUSSIAN_SIGMA**2) if region.mask_type == "gaussian" else 1.0
    sides = (profile(region.mask_type, side) for side in box.size)
    return region.weight * density * torch.outer(*sides)


def _ramp(length: int, feather: float, start: bool, end: bool) -> Tensor:
    place = torch.arange(length, dtype=torch.float64) + 0.5
    ramp = torch.ones(length, dtype=torch.float64)
    if feather > 0 and start:
        ramp = torch.minimum(ramp, place / feather)
    if feather > 0 and end:
        ramp = torch.minimum(ramp, (length - place) / feather)
    return ramp


def _grown(start: int, end: int, tile: int, length: int) -> tuple[int, int]:
    """The span, or a tile's length around it where it is shorter, inside the canvas."""
    if end - start >= tile:
        return start, end
    start = min(max(0, (start + end - tile) // 2), length - tile)
    return start, start + tile


def _crops(box: Tile, size: Size, side: Size, overlap: int, blend: str) -> Iterator[tuple[Tile, Tensor]]:
    """Full-size tiles over a box, and each one's share ``[h, w]`` of the part of the box that it decides.

    A box smaller than a tile is seen with what surrounds it: the denoiser knows its native size best.
    """
    extent = Size(min(side.height, size.height), min(side.width, size.width))
    top, bottom = _grown(box.top, box.bottom, extent.height, size.height)
    left, right = _grown(box.left, box.right, extent.width, size.width)
    box = Tile(0, 0, top, left, bottom, right)
    tiles = grid(box.size, extent, min(overlap, min(extent) - 1))  # a canvas may be shorter than the overlap
    for tile, weight in zip(tiles, grid_weights(tiles, box.size, blend), strict=True):
        place = Tile(0, 0, tile.top + box.top, tile.left + box.left, tile.bottom + box.top, tile.right + box.left)
        yield place, torch.outer(weight.rows, weight.cols)


def region_views(
    plan: RegionPlan, size: Size, *, side: Size, overlap: int, blend: str, guidance_scale: float
) -> list[View]:
    """All views of a canvas of ``size`` latents: at every latent their weights add up to 1.

    Args:
        plan: regions in pixels; ``size`` may be the low-res canvas, to which their boxes are scaled.
        size: of the canvas in latents.
        side: of a tile, in latents.
        overlap: of tiles inside one region, in latents.
        blend: weight of tiles inside one region.
        guidance_scale: of the main prompt, when there are no regions.
    """
    if not plan.regions:
        return grid_views(grid(size, side, overlap), size, blend=blend, guidance_scale=guidance_scale)
    boxes = [_box(region, plan, size) for region in plan.regions]
    scale = size.height / plan.size.height
    masks = [
        region_mask(region, box, region.feather * scale, size) for region, box in zip(plan.regions, boxes, strict=True)
    ]
    total = torch.zeros(size, dtype=torch.float64)
    for region, box, mask in zip(plan.regions, boxes, masks, strict=True):
        if region.mode == "blend":
            total[box.index] += mask
    rest = torch.ones(size, dtype=torch.float64)  # what the replacing regions above leave
    layers = [(row, region) for row, region in enumerate(plan.regions)]
    layers.sort(key=lambda layer: (layer[1].mode == "replace", layer[0]))
    views: list[View] = []
    for row, region in reversed(layers):
        box, mask = boxes[row], masks[row]
        say = torch.zeros(size, dtype=torch.float64)
        say[box.index] = (mask if region.mode == "replace" else mask / total[box.index]) * rest[box.index]
        if region.mode == "replace":
            rest[box.index] *= 1 - mask
        for tile, share in _crops(box, size, side, overlap, blend):
            weight = (say[tile.index] * share).float()
            if bool((weight > 0).any()):
                rows, cols = (torch.ones(length, dtype=torch.float64) for length in tile.size)
                views.append(View(tile, Weight(rows, cols, weight), row + 1, region.guidance_scale))
    return views[::-1]
