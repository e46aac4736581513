"""Regions on another canvas of the same picture: the low-res one, or that of an upscaling phase. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig

from stages.regions.config import Region, Regions
from stages.tiles import Size, Tile

_NOT_SHAPE = ("prompt", "negative_prompt", "seed", "epsilon")  # of a region: what the number of passes does not hang on


def scaled(regions: Regions, size: Size) -> Regions:
    """All of it on a canvas of ``size`` pixels; edges go to the nearest latent, no box vanishes.

    Re-rolled rectangles are scaled too: a seed decides its place of the picture at every size, or the low-res picture,
    which lays the picture out, would keep what the person wanted to see replaced.
    """
    down, across = size.height / regions.size.height, size.width / regions.size.width
    latents = Size(size.height // regions.factor, size.width // regions.factor)

    def place(box: Tile, factor: int) -> Tile:
        top, bottom = _span(box.top / factor * down, box.bottom / factor * down, latents.height)
        left, right = _span(box.left / factor * across, box.right / factor * across, latents.width)
        return Tile(box.row, box.col, top, left, bottom, right)

    moved = []
    for region in regions.regions:
        box = place(region.box, regions.factor).scaled(regions.factor)
        feather = min(round(region.feather * min(down, across)), *box.size)
        moved.append(replace(region, box=box, feather=feather))
    rerolls = tuple(reroll._replace(box=place(reroll.box, 1)) for reroll in regions.rerolls)
    return replace(regions, size=size, regions=tuple(moved), rerolls=rerolls)


def _span(start: float, end: float, length: int) -> tuple[int, int]:
    first = min(round(start), length - 1)
    return first, min(max(first + 1, round(end)), length)


def lowres_regions(config: DictConfig, regions: Regions) -> Regions:
    """The regions on the low-res canvas."""
    return scaled(regions, Size(config.lowres.height, config.lowres.width))


def lowres_side(config: DictConfig, regions: Regions) -> Size:
    """Latents of a low-res tile: the largest region's, within one and two native sizes; two without regions.

    A region is then seen whole and on its own, so that its subject is composed for its box.
    """
    native, step = config.model.native_size // config.model.vae_scale_factor, config.model.patch
    if not regions.regions:
        return Size(2 * native, 2 * native)
    sides = (
        max(sides) // regions.factor for sides in zip(*(region.box.size for region in regions.regions), strict=True)
    )
    return Size(*(min(max(-(-side // step) * step, native), 2 * native) for side in sides))


def parameter(regions: Regions, key: str, stage: str) -> Any:
    """What of ``regions`` or ``reroll`` makes the result of ``stage``, on whose canvas ``regions`` is.

    Texts for the text encoder, shapes for the ``profile``, all of it for the others; however they were written.
    """
    if key == "reroll":
        return [{**item._asdict(), "box": _edges(item.box)} for item in regions.rerolls]
    if stage == "text_encode":
        return [list(texts) for texts in regions.texts[1:]]
    return [_plain(region, *(_NOT_SHAPE if stage == "profile" else ())) for region in regions.regions]


def _plain(region: Region, *without: str) -> dict[str, Any]:
    found: Mapping[str, Any] = {**asdict(region), "box": _edges(region.box)}
    return {key: value for key, value in found.items() if key not in without}


def _edges(box: Tile) -> list[int]:
    return [box.left, box.top, box.right, box.bottom]
