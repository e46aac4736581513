"""The JSON files of github.com/albarji/mixture-of-diffusers, canvas and tiling, read as they are.

``plain`` gives the regions in our own form; ``overrides`` what else such a file decides: size, steps, seed, scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from stages.config import ConfigError, close_match

_CANVAS = {
    *("canvas_width", "canvas_height", "gc", "steps", "seed", "scheduler", "regions", "reroll_regions"),
    *("cpu_vae", "decode_steps", "prompt", "negative_prompt"),
}
_TILING = {
    *("prompt", "tile_width", "tile_height", "tile_row_overlap", "tile_col_overlap", "gc", "gc_tiles", "steps"),
    *("seed", "seed_tiles", "seed_tiles_mode", "seed_reroll_regions", "scheduler", "cpu_vae", "negative_prompt"),
}


def is_canvas(written: Any) -> bool:
    return isinstance(written, Mapping) and ("canvas_width" in written or "canvas_height" in written)


def is_tiling(written: Any) -> bool:
    return isinstance(written, Mapping) and isinstance(written.get("prompt"), Sequence) and "grid" not in written


def overrides(written: Any) -> dict[str, Any]:
    """What a mixture-of-diffusers file says beside its regions, as config keys; {} for our own form.

    ``scheduler`` is the name of a scheduler option. A reference image that covers the canvas becomes ``guide.image``
    in mode ``hold``: its ``strength`` is the share of the steps that it holds.
    """
    if not is_canvas(written) and not is_tiling(written):
        return {}
    _known(written)
    found: dict[str, Any] = {}
    if is_canvas(written):
        found["width"], found["height"] = _whole(written, "canvas_width"), _whole(written, "canvas_height")
        for index, region in enumerate(_listed(written, "regions")):
            if isinstance(region, Mapping) and region.get("ref_img") is not None:
                found |= _image(index, region, found["width"], found["height"])
    else:
        rows, cols = _shape(written)
        height, width, down, across = _tile(written)
        found["width"] = width + (cols - 1) * (width - across)
        found["height"] = height + (rows - 1) * (height - down)
        found["denoise.tile_size"] = max(height, width)
    if written.get("gc") is not None:
        found["denoise.guidance_scale"] = found["lowres.guidance_scale"] = written["gc"]
    if written.get("steps") is not None:
        found["denoise.num_inference_steps"] = found["lowres.num_inference_steps"] = written["steps"]
    return found | {key: written[key] for key in ("seed", "scheduler") if written.get(key) is not None}


def plain(written: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(regions in our own form, rerolls): a mixture-of-diffusers file translated, anything else as it is."""
    if is_canvas(written):
        _known(written)
        regions = [r for r in _listed(written, "regions") if not (isinstance(r, Mapping) and r.get("ref_img"))]
        rerolls = [_canvas_reroll(index, r) for index, r in enumerate(_listed(written, "reroll_regions"))]
        return {"regions": [_without(r, "strength", "type") for r in regions], "background": False}, rerolls
    if is_tiling(written):
        _known(written)
        rerolls = [_tiling_reroll(index, r) for index, r in enumerate(_listed(written, "seed_reroll_regions"))]
        return {"regions": _tiles(written), "background": False}, rerolls
    return written, []


def _known(written: Mapping[str, Any]) -> None:
    names = _CANVAS if is_canvas(written) else _TILING
    for name in written:
        if name not in names:
            raise ConfigError(
                f"regions.{name}", written[name], f"one of {', '.join(sorted(names))}", close_match(name, names)
            )


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _listed(written: Mapping[str, Any], key: str) -> Sequence[Any]:
    """The list at ``key``; empty where there is none."""
    found = written.get(key)
    if found is None:
        return ()
    if not _is_list(found):
        raise ConfigError(f"regions.{key}", found, "a list")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _edges(key: str, value: Any, order: str = "[row0, row1, col0, col1]") -> list[Any]:
    """The numbers of a box (and what ``order`` says comes after them)."""
    if not _is_list(value) or len(value) != order.count(",") + 1 or not all(map(_is_number, value)):
        raise ConfigError(key, value, f"{order}: numbers")
    return list(value)


def _whole(written: Mapping[str, Any], key: str) -> int:
    value = written.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"regions.{key}", value, "a number of pixels")
    return value


def _without(region: Any, *names: str) -> Any:
    if not isinstance(region, Mapping):
        return region
    region = {key: value for key, value in region.items() if key not in names}
    edges = [region.pop(key, None) for key in ("row_init", "row_end", "col_init", "col_end")]
    return region if None in edges else {**region, "area": edges}


def _image(index: int, region: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    area = _without(region, "ref_img").get("area")
    if not _is_list(area) or list(area) != [0, height, 0, width]:
        expected = f"[0, {height}, 0, {width}]: a reference image for the whole canvas"
        raise ConfigError(f"regions[{index}].area", area, expected, "Enlarge the image to the canvas.")
    strength = region.get("strength", 0.8)
    return {
        "guide.image": region["ref_img"],
        "guide.mode": "hold",
        "guide.hold_steps": strength,
        "denoise.strength": 1.0,
    }


def _canvas_reroll(index: int, region: Any) -> dict[str, Any]:
    region = _without(region)
    if not isinstance(region, Mapping) or "area" not in region:
        raise ConfigError(f"regions.reroll_regions[{index}]", region, "{area: [row0, row1, col0, col1], seed: NUMBER}")
    top, bottom, left, right = _edges(f"regions.reroll_regions[{index}].area", region["area"])
    found = {"box": [left, top, right, bottom], "seed": region.get("seed", region.get("region_seed"))}
    if region.get("reroll_mode", "reset") == "epsilon":
        found |= {"mode": "epsilon", "epsilon": region.get("noise_eps", 0.2)}
    return found


def _tiling_reroll(index: int, region: Any) -> dict[str, Any]:
    top, bottom, left, right, seed = _edges(
        f"regions.seed_reroll_regions[{index}]", region, "[row0, row1, col0, col1, seed]"
    )
    return {"box": [left, top, right, bottom], "seed": seed}


def _shape(written: Mapping[str, Any]) -> tuple[int, int]:
    rows = written["prompt"]
    if not rows or not all(map(_is_list, rows)):
        raise ConfigError("regions.prompt", rows, "rows of prompts")
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ConfigError("regions.prompt", [len(row) for row in rows], "rows of equal length")
    return len(rows), len(rows[0])


def _tile(written: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Height, width, overlap down and overlap across of a tile; the defaults are mixture-of-diffusers'."""
    sizes = {"tile_height": 512, "tile_width": 512, "tile_row_overlap": 256, "tile_col_overlap": 256} | dict(written)
    height, width, down, across = (
        _whole(sizes, key) if sizes[key] != 0 else 0
        for key in ("tile_height", "tile_width", "tile_row_overlap", "tile_col_overlap")
    )
    if not (down < height and across < width):
        raise ConfigError("regions.tile_row_overlap", [down, across], f"less than the tile of {width}x{height}")
    return height, width, down, across


def _table(written: Mapping[str, Any], key: str) -> list[list[Any]]:
    """An optional table of a value a tile; one value stands for all of them.

    Raises:
        ConfigError: rows or columns that are not those of the prompts.
    """
    rows, cols = _shape(written)
    table = written.get(key)
    if not _is_list(table):
        return [[table] * cols for _ in range(rows)]
    for row, cells in enumerate(table):
        if not _is_list(cells) or len(cells) != cols:
            raise ConfigError(f"regions.{key}[{row}]", cells, f"a row of {cols} values, one a prompt")
    if len(table) != rows:
        raise ConfigError(f"regions.{key}", f"{len(table)} rows", f"{rows} rows of {cols} values, one a prompt")
    return [list(cells) for cells in table]


def _tiles(written: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, cols = _shape(written)
    height, width, down, across = _tile(written)
    guidance, seeds, modes = (_table(written, key) for key in ("gc_tiles", "seed_tiles", "seed_tiles_mode"))
    found = []
    for row in range(rows):
        for col in range(cols):
            prompt, place = written["prompt"][row][col], f"[{row}][{col}]"
            if not isinstance(prompt, str):
                raise ConfigError(f"regions.prompt{place}", prompt, "a text")
            for key, value in (("gc_tiles", guidance[row][col]), ("seed_tiles", seeds[row][col])):
                if value is not None and not _is_number(value):
                    raise ConfigError(f"regions.{key}{place}", value, "a number")
            if modes[row][col] == "exclusive":
                expected = "full; write the part of a tile that no other shares as seed_reroll_regions"
                raise ConfigError(f"regions.seed_tiles_mode{place}", "exclusive", expected)
            top, left = row * (height - down), col * (width - across)
            area = [top, top + height, left, left + width]
            found.append(
                {"prompt": prompt, "area": area, "guidance_scale": guidance[row][col], "seed": seeds[row][col]}
            )
    return found
