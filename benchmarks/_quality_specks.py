"""Specks: small dark or bright spots in skies that were asked clear, at 2048x2048; and the detector's own error.

A speck is a round extremum of a difference of Gaussians that stands out of what is around it. The sky is what the
counter's network says is sky, of the picture at 256 pixels, without what lies near anything else.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage

from benchmarks._quality_scenes import Scene
from training.counter import materials, together
from training.scenes import View
from training.specs import sample_spec

SIDE = 2048
SIGMAS = (1.5, 2.5, 4.0, 6.5, 10.0)  # pixels; a speck is about twice as wide
RATIO = 1.6  # of the two Gaussians
CONTRAST = 8.0  # 8-bit levels that a speck differs by at least
ABOVE = 7.0  # times the mean response within REACH sigmas
REACH = 12
ROUND = 3.0  # its longer side over its shorter one at most
EDGE = 3  # cells of four pixels at 256 that the sky keeps away from everything else
_PEAK = 1 / 2 - 1 / (1 + RATIO**2)  # response to a Gaussian spot of the same width, over its height


class Speck(NamedTuple):
    """Where, how wide (standard deviation), and by how many levels it differs (below 0: darker)."""

    y: int
    x: int
    sigma: float
    contrast: float


def sky_of(picture: np.ndarray) -> np.ndarray:
    """Where a picture ``[H,W,3]`` uint8 shows plain sky, ``[H,W]`` bool."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    sky = (together(materials(pixels), ["sky", "clouds"]) > 0.5).numpy()
    # what is no sky but lies within it is left out only if it is large enough to be something: specks are smaller
    sky = ndimage.binary_closing(np.pad(sky, 2, mode="edge"), iterations=1)[2:-2, 2:-2]
    sky = ndimage.binary_erosion(sky, np.ones((3, 3)), iterations=EDGE, border_value=1)
    rows, columns = (np.arange(n) * m // n for n, m in zip(picture.shape[:2], sky.shape, strict=True))
    return sky[rows[:, None], columns]


def specks(picture: np.ndarray, sky: np.ndarray) -> list[Speck]:
    """The specks of a picture ``[H,W,3]`` uint8 in its sky ``[H,W]`` bool, the strongest first."""
    height = int(np.flatnonzero(sky.any(1)).max(initial=-1)) + 1
    if not height:
        return []
    picture, sky = picture[:height], sky[:height]
    luma = picture.astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
    found = list[Speck]()
    for sigma in SIGMAS:
        response = ndimage.gaussian_filter(luma, sigma) - ndimage.gaussian_filter(luma, RATIO * sigma)
        strength = np.abs(response)
        around = ndimage.uniform_filter(strength, int(2 * REACH * sigma) | 1)
        size = 2 * round(2 * sigma) + 1
        peak = (strength == ndimage.maximum_filter(strength, size)) & sky
        peak &= (strength > CONTRAST * _PEAK) & (strength > ABOVE * around)
        for y, x in np.argwhere(peak):
            if _round(response, int(y), int(x)):
                found.append(Speck(int(y), int(x), sigma, float(response[y, x]) / _PEAK))
    kept = list[Speck]()
    for one in sorted(found, key=lambda speck: -abs(speck.contrast)):
        if all(np.hypot(one.y - k.y, one.x - k.x) > 3 * max(one.sigma, k.sigma) for k in kept):
            kept.append(one)
    return kept


def _round(response: np.ndarray, y: int, x: int) -> bool:
    """Whether the response falls off alike in all directions (the ratio of principal curvatures, as Lowe has it)."""
    if not (0 < y < response.shape[0] - 1 and 0 < x < response.shape[1] - 1):
        return False
    near = response[y - 1 : y + 2, x - 1 : x + 2].astype(np.float64)
    xx, yy = near[1, 0] + near[1, 2] - 2 * near[1, 1], near[0, 1] + near[2, 1] - 2 * near[1, 1]
    xy = (near[0, 0] + near[2, 2] - near[0, 2] - near[2, 0]) / 4
    determinant = xx * yy - xy * xy
    return determinant > 0 and (xx + yy) ** 2 < determinant * (ROUND + 1) ** 2 / ROUND


def paint(picture: np.ndarray, sky: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, list[Speck]]:
    """The picture with ``count`` spots painted into its sky, 10 to 40 levels darker or brighter, and what they are."""
    rng, painted = random.Random(seed), list[Speck]()
    light, places = picture.astype(np.float32), np.argwhere(sky)
    for _ in range(count):
        y, x = (int(v) for v in places[rng.randrange(len(places))])
        sigma, contrast = rng.uniform(1.5, 8), rng.choice((-1, 1)) * rng.uniform(10, 40)
        reach = int(4 * sigma)
        rows, columns = (slice(max(0, v - reach), v + reach + 1) for v in (y, x))
        dy, dx = np.ogrid[: light.shape[0], : light.shape[1]][0][rows] - y, np.arange(light.shape[1])[columns] - x
        light[rows, columns] += contrast * np.exp(-(dy**2 + dx**2) / (2 * sigma**2))[..., None]
        painted.append(Speck(y, x, sigma, contrast))
    return light.round().clip(0, 255).astype(np.uint8), painted


def true_sky(number: int, side: int = SIDE) -> np.ndarray:
    """A rendered scene of clear weather, not at night (stars are specks), ``[side,side,3]`` uint8."""
    rng = random.Random(977 + number)
    while (spec := sample_spec(rng)).weather != "clear" or spec.time == "night" or spec.subject == "birds":
        pass
    scene, parts = Scene(spec, number), max(1, side // 512)
    places = (torch.arange(parts) + 0.5) / parts
    rows = []
    for y in places.flip(0):  # a row of squares at a time: the picture's memory hangs on their size only
        options: dict[str, Any] = {"zoom": torch.full((parts,), float(parts)), "max_zoom": float(parts)}
        view = View(centre_x=places, centre_y=y.expand(parts), size=side // parts, **options)
        images, _ = scene.render(view)
        rows.append(torch.cat(list(images), -1))
    pixels = ((torch.cat(rows, -2) + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).numpy()


def detector_error(count: int, painted: int = 20) -> dict[str, Any]:
    """Of true clear skies: how many show a speck that is none, and what share of painted ones is found."""
    false, hits, skies = [], 0, 0
    for number in range(count):
        picture = true_sky(number)
        sky = sky_of(picture)
        if sky.mean() < 0.05:
            continue
        skies += 1
        false.append(len(specks(picture, sky)))
        spotted, truth = paint(picture, sky, painted, number)
        seen = specks(spotted, sky)
        hits += sum(any(np.hypot(s.y - t.y, s.x - t.x) <= 2 + t.sigma for s in seen) for t in truth)
    return {
        "skies": skies,
        "with_false": sum(n > 0 for n in false),
        "false": sum(false),
        "found_of_painted": round(hits / max(1, painted * skies), 3),
    }
