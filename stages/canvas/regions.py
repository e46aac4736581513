"""Regions: prompts of their own for parts of the canvas. Reads what a person wrote, refuses what cannot work.

Boxes are pixels of the canvas. Everything here is plain data: no torch; ``stages.canvas.layers`` makes views of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf

from stages.canvas.tiles import Size, Tile, whole
from stages.config import BLENDS, ConfigError, close_match


class Reroll(NamedTuple):
    """A rectangle of the noise (in latents) that another seed decides.

    ``reset``: the rectangle is drawn anew. ``epsilon``: it is mixed, ``sqrt(1-e^2) old + e new``, which stays standard
    normal; a small ``epsilon`` varies the picture a little.
    """

    box: Tile
    seed: int
    mode: Literal["reset", "epsilon"] = "reset"
    epsilon: float = 0.2


@dataclass(kw_only=True, frozen=True)
class Region:
    """One prompt for one box (pixels).

    ``blend`` regions join the weighted sum with ``weight`` times the ``mask_type`` over their box; ``replace`` regions
    are laid over it in their order, fading in over ``feather`` pixels inside their box.
    """

    box: Tile
    prompt: str
    negative_prompt: str = ""
    guidance_scale: float = 7.5
    weight: float = 1.0
    mask_type: str = "gaussian"
    seed: int | None = None
    epsilon: float | None = None  # with a seed: mixes the noise in the box instead of drawing it anew
    mode: Literal["blend", "replace"] = "blend"
    feather: int = 0


@dataclass(kw_only=True, frozen=True)
class RegionPlan:
    """All regions of a canvas of ``size`` pixels. Row 0 of the embeddings is the main prompt, row i + 1 region i."""

    size: Size
    factor: int
    main: tuple[str, str]  # prompt, negative prompt
    regions: tuple[Region, ...]
    rerolls: tuple[Reroll, ...] = field(default=())

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """(prompt, negative prompt) of each row of the embeddings."""
        return (self.main, *((region.prompt, region.negative_prompt) for region in self.regions))


_KEYS = {
    *("prompt", "negative_prompt", "guidance_scale", "weight", "mask_type", "seed", "epsilon", "mode", "feather"),
    *("box", "area"),
}
_RENAMED = {"mask_weight": "weight", "noise_eps": "epsilon", "region_seed": "seed", "gc": "guidance_scale"}
_MODES = ("blend", "replace")


class _Reader:
    """Turns what was written into regions; knows the defaults and where on the canvas it is."""

    def __init__(self, size: Size, factor: int, defaults: Mapping[str, Any]) -> None:
        self.size, self.factor, self.defaults = size, factor, defaults

    def number(self, key: str, value: Any, least: float, most: float, kind: type = float) -> Any:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not ok or (kind is int and value != int(value)):
            raise ConfigError(key, value, f"{'a whole number' if kind is int else 'a number'}, {least} to {most}")
        return kind(value)

    def box(self, key: str, value: Any, *, area: bool = False) -> Tile:
        """``[left, top, right, bottom]``, or as ``area`` ``[top, bottom, left, right]``; pixels, or all within 0..1."""
        order = "[row0, row1, col0, col1]" if area else "[left, top, right, bottom]"
        expected = f"{order} in pixels, or as fractions 0..1"
        four = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4
        numbers = [float(v) for v in value if isinstance(v, int | float) and not isinstance(v, bool)] if four else []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise ConfigError(key, value, expected)
        edges = numbers if area else [numbers[1], numbers[3], numbers[0], numbers[2]]
        extents = (self.size.height, self.size.height, self.size.width, self.size.width)
        if all(0 <= v <= 1 for v in edges):  # a fraction names a place, and the place is a latent's edge
            edges = [round(v * e / self.factor) * self.factor for v, e in zip(edges, extents, strict=True)]
        if any(v != int(v) or int(v) % self.factor for v in edges):
            raise ConfigError(key, value, f"pixels that are multiples of {self.factor}", f"The order is {order}.")
        top, bottom, left, right = (int(v) for v in edges)
        if not (0 <= top < bottom <= self.size.height and 0 <= left < right <= self.size.width):
            raise ConfigError(
                key, value, f"a box inside the canvas of {self.size.width}x{self.size.height}", f"The order is {order}."
            )
        return Tile(0, 0, top, left, bottom, right)

    def region(self, key: str, value: Any, box: Tile | None = None, **given: Any) -> Region:
        """One region; ``box`` and ``given`` are what its place already decides."""
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, "a region: {prompt: TEXT, box: [left, top, right, bottom]}")
        found = {**given, **{_RENAMED.get(name, name): v for name, v in value.items() if v is not None}}
        for name in found:
            if name not in _KEYS:
                raise ConfigError(
                    f"{key}.{name}", found[name], f"one of {', '.join(sorted(_KEYS))}", close_match(name, _KEYS)
                )
        if box is None:
            if ("box" in found) == ("area" in found):
                raise ConfigError(key, dict(value), "a box (or a mixture-of-diffusers area)")
            area = "area" in found
            name = "area" if area else "box"
            box = self.box(f"{key}.{name}", found[name], area=area)
        if not isinstance(found.get("prompt"), str):
            raise ConfigError(f"{key}.prompt", found.get("prompt"), "a text")
        return self._checked(key, found, box)

    def _checked(self, key: str, found: dict[str, Any], box: Tile) -> Region:
        mask = found.get("mask_type", self.defaults["mask_type"])
        if mask not in BLENDS:
            raise ConfigError(f"{key}.mask_type", mask, f"one of {', '.join(BLENDS)}", close_match(str(mask), BLENDS))
        mode = found.get("mode", "blend")
        if mode not in _MODES:
            raise ConfigError(f"{key}.mode", mode, f"one of {', '.join(_MODES)}", close_match(str(mode), _MODES))
        guidance = found.get("guidance_scale", self.defaults["guidance_scale"])
        seed, epsilon = found.get("seed"), found.get("epsilon")
        if epsilon == 0:
            epsilon = None  # mixture-of-diffusers writes 0 for none
        if epsilon is not None and seed is None:
            raise ConfigError(f"{key}.epsilon", epsilon, "a seed beside it", "It mixes that seed's noise into the box.")
        feather = self.number(f"{key}.feather", found.get("feather", 0), 0, min(box.size), int)
        weight = self.number(f"{key}.weight", found.get("weight", 1.0), 0, 1e6)
        if weight == 0:
            raise ConfigError(f"{key}.weight", weight, "more than 0", "Leave the region out instead.")
        return Region(
            box=box,
            prompt=found["prompt"],
            negative_prompt=str(found.get("negative_prompt", self.defaults["negative_prompt"])),
            guidance_scale=self.number(f"{key}.guidance_scale", guidance, 0, 100),
            weight=weight,
            mask_type=mask,
            seed=None if seed is None else self.number(f"{key}.seed", seed, 0, 2**64 - 1, int),
            epsilon=None if epsilon is None else self.number(f"{key}.epsilon", epsilon, 0, 1),
            mode=mode,
            feather=feather,
        )

    def grid(self, key: str, rows: Any, overlap: int, **given: Any) -> list[Region]:
        """One region a cell; neighbours share ``overlap`` pixels."""
        lists = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0
        if not lists or any(isinstance(row, str) or not isinstance(row, Sequence) or not row for row in rows):
            raise ConfigError(key, rows, "rows of prompts: [[top left, top right], [bottom left, bottom right]]")
        if len({len(row) for row in rows}) > 1:
            raise ConfigError(key, [len(row) for row in rows], "rows of equal length")
        vertical = self._cells(key, self.size.height, len(rows), overlap)
        horizontal = self._cells(key, self.size.width, len(rows[0]), overlap)
        return [
            self.region(f"{key}[{i}][{j}]", cell, Tile(i, j, top, left, bottom, right), **given)
            for i, (row, (top, bottom)) in enumerate(zip(rows, vertical, strict=True))
            for j, (cell, (left, right)) in enumerate(zip(row, horizontal, strict=True))
        ]

    def _cells(self, key: str, length: int, count: int, overlap: int) -> list[tuple[int, int]]:
        units, reach = length // self.factor, overlap // self.factor // 2
        if units < count:
            raise ConfigError(key, count, f"at most {units} cells along {length} pixels")
        cuts = [index * units // count for index in range(count + 1)]
        grown = [(max(0, a - reach), min(units, b + reach)) for a, b in itertools.pairwise(cuts)]
        return [(a * self.factor, b * self.factor) for a, b in grown]

    def reroll(self, key: str, value: Any) -> Reroll:
        if not isinstance(value, Mapping) or not {"box", "seed"} <= set(value) <= {"box", "seed", "mode", "epsilon"}:
            raise ConfigError(key, value, "{box: [left, top, right, bottom], seed: NUMBER, mode: reset|epsilon}")
        mode = value.get("mode", "epsilon" if "epsilon" in value else "reset")
        if mode not in ("reset", "epsilon"):
            raise ConfigError(f"{key}.mode", mode, "reset or epsilon", close_match(str(mode), ("reset", "epsilon")))
        epsilon = self.number(f"{key}.epsilon", value.get("epsilon", 0.2), 0, 1)
        seed = self.number(f"{key}.seed", value["seed"], 0, 2**64 - 1, int)
        return Reroll(self.latent(self.box(f"{key}.box", value["box"])), seed, mode, epsilon)

    def latent(self, box: Tile) -> Tile:
        return Tile(box.row, box.col, *(edge // self.factor for edge in box[2:]))


def uncovered(size: Size, boxes: Sequence[Tile]) -> Tile | None:
    """The first part of the canvas, top to bottom, that no box covers; None if there is none."""
    rows = sorted({0, size.height, *(edge for box in boxes for edge in (box.top, box.bottom))})
    cols = sorted({0, size.width, *(edge for box in boxes for edge in (box.left, box.right))})
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(cols)):
        cell = Tile(0, 0, top, left, bottom, right)
        if not any(box.overlaps(cell) for box in boxes):
            return cell
    return None


def parse(
    written: Any,
    *,
    size: Size,
    factor: int = 8,
    prompt: str = "",
    negative_prompt: str = "",
    guidance_scale: float = 7.5,
    overlap: int = 64,
    rerolls: Sequence[Any] = (),
) -> RegionPlan:
    """Regions as a person or a mixture-of-diffusers file wrote them, on a canvas of ``size`` pixels.

    Args:
        written: a list of regions, or ``{regions: [...], grid: [[...]], background: TEXT or region or false}``, or
            the contents of a mixture-of-diffusers JSON file (see ``stages.canvas.region_files``).
        size: of the canvas in pixels.
        factor: pixels to a latent.
        prompt, negative_prompt, guidance_scale: what a region that does not say gets; ``prompt`` is the background
            when the regions leave a part of the canvas uncovered.
        overlap: pixels that the cells of a ``grid`` share.
        rerolls: ``[{box, seed, mode, epsilon}]``.

    Raises:
        ConfigError: names the region and what is wrong with it, or the part of the canvas that is uncovered.
    """
    from stages.canvas.region_files import plain

    defaults = {"negative_prompt": negative_prompt, "guidance_scale": guidance_scale, "mask_type": "gaussian"}
    written, more_rerolls = plain(written)
    reader = _Reader(size, factor, defaults)
    if not isinstance(written, Mapping):
        written = {"regions": written}
    for name in written:
        if name not in ("regions", "grid", "background", "overlap"):
            known = ("regions", "grid", "background", "overlap")
            raise ConfigError(f"regions.{name}", written[name], f"one of {', '.join(known)}", close_match(name, known))
    listed = written.get("regions") or []
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ConfigError("regions", listed, "a list of regions")
    regions = [reader.region(f"regions[{index}]", value) for index, value in enumerate(listed)]
    if written.get("grid") is not None:
        share = reader.number("regions.overlap", written.get("overlap", overlap), 0, min(size), int)
        regions = [*reader.grid("regions.grid", written["grid"], share), *regions]
    background = written.get("background")
    solid = [region.box for region in regions if region.mode == "blend" or region.feather == 0]
    hole = uncovered(size, solid)
    if background is None and hole is not None and prompt:
        background = prompt
    if background not in (None, False, ""):
        regions = [reader.region("regions.background", background, whole(size), mask_type="constant"), *regions]
    elif hole is not None:
        place = f"{hole.left},{hole.top} to {hole.right},{hole.bottom}"
        raise ConfigError(
            "regions", f"nothing for pixels {place}", "regions that cover the canvas", "Or give a prompt as background."
        )
    return RegionPlan(
        size=size,
        factor=factor,
        main=(prompt, negative_prompt),
        regions=tuple(regions),
        rerolls=_rerolls(reader, regions, [*rerolls, *more_rerolls]),
    )


def _rerolls(reader: _Reader, regions: Sequence[Region], listed: Sequence[Any]) -> tuple[Reroll, ...]:
    own = [
        Reroll(reader.latent(r.box), r.seed)
        if r.epsilon is None
        else Reroll(reader.latent(r.box), r.seed, "epsilon", r.epsilon)
        for r in regions
        if r.seed is not None
    ]
    return (*own, *(reader.reroll(f"reroll[{index}]", value) for index, value in enumerate(listed)))


def from_config(config: DictConfig, *, guidance_scale: float | None = None) -> RegionPlan:
    """The regions of a resolved config, none if it has none; ``guidance_scale``: of those that do not say theirs
    (default: ``denoise.guidance_scale``)."""
    written = config.regions
    if OmegaConf.is_config(written):
        written = OmegaConf.to_container(written, resolve=True)
    size, factor = Size(config.height, config.width), config.model.vae_scale_factor
    rerolls = OmegaConf.to_container(config.reroll, resolve=True)
    assert isinstance(rerolls, list)
    common: dict[str, Any] = {
        "size": size,
        "factor": factor,
        "prompt": config.prompt or "",
        "negative_prompt": config.negative_prompt,
        "guidance_scale": config.denoise.guidance_scale if guidance_scale is None else guidance_scale,
        "rerolls": rerolls,
    }
    if not written:
        reader = _Reader(size, factor, {})
        found = _rerolls(reader, (), rerolls)
        return RegionPlan(
            size=size, factor=factor, main=(common["prompt"], config.negative_prompt), regions=(), rerolls=found
        )
    return parse(written, overlap=config.denoise.overlap, **common)
