"""Reads one region, grid or re-rolled rectangle as a person wrote it, and refuses what cannot work, naming the key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stages.config import BLENDS, ConfigError, close_match
from stages.regions.types import Region, Reroll
from stages.tiles import Size, Tile

_KEYS = {
    *("prompt", "negative_prompt", "guidance_scale", "weight", "mask_type", "seed", "epsilon", "mode", "feather"),
    *("box", "area"),
}
_RENAMED = {"mask_weight": "weight", "noise_eps": "epsilon", "region_seed": "seed", "gc": "guidance_scale"}
_MODES = ("blend", "replace")


class Reader:
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
        guidance = found.get("guidance_scale")
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
            guidance_scale=None if guidance is None else self.number(f"{key}.guidance_scale", guidance, 0, 100),
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
