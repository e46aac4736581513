"""Large pictures of the default command: added detail, how visible tile borders are, specks in skies asked clear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks._measure import runner, slug
from benchmarks._quality_specks import sky_of, specks
from stages.documents import load
from stages.picture import seams
from stages.tiles import Tile, latent_grid

BLUR = 2.0  # pixels: standard deviation of the Gaussian; what it takes away counts as high frequency
MOVED = 13  # latents
CLEAR = (  # no night: stars are specks
    "a lighthouse on a cliff at sunset, clear sky",
    "snowy mountains at noon under a clear sky",
    "a sailboat on the calm sea by day, cloudless sky",
    "a windmill on a green meadow in the afternoon, clear sky",
    "a desert with sand dunes at sunrise, clear weather",
    "a castle in the mountains in bright daylight, clear sky",
    "a cottage by a lake at dusk under a clear sky",
    "a lone tree in a snowy field at midday, clear sky",
    "the open sea at sunset, cloudless sky",
    "a cactus in the desert by day, clear sky",
    "a beach in the early morning, clear sky",
    "a stone bridge over a lake in daylight, clear weather",
    "a pine forest at twilight under a clear sky",
    "a ship on the ocean at golden hour, clear sky",
    "a tent in the mountains at dawn, clear sky",
    "green hills in the afternoon, cloudless sky",
    "a hot air balloon over the desert at sunrise, clear sky",
    "a lighthouse on the beach at noon, clear sky",
    "snowy peaks in the evening, clear sky",
    "a house on a cliff above the sea by day, clear sky",
)


def runs(model: Path, output: Path, count: int) -> list[Path]:
    """Folders of finished default runs of the first ``count`` prompts; what is there already is not made again."""
    found = []
    for number, prompt in enumerate(CLEAR[:count]):
        name = f"{number:02}-{slug(prompt)}"[:60]
        print(f"runs: python runner.py prompt={prompt!r} (minutes)", flush=True)
        given = (
            f"run={name}",
            "stage=all",
            "model=embedded",
            f"model.path={model}",
            f"prompt={prompt}",
            "progress=false",
        )
        runner(output, *given).check()
        found.append(output / name)
    return found


def high_frequency_energy(picture: Image.Image) -> float:
    """Mean square of what a Gaussian blur takes away from the luma, in squared 8-bit levels."""
    luma = np.asarray(picture.convert("L"), dtype=np.float32)
    # Pillow blurs 8-bit pictures only, and rounding would count as detail: the kernel is applied to floats here
    radius = int(4 * BLUR)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / BLUR) ** 2)
    kernel /= kernel.sum()
    blurred = np.pad(luma, radius, mode="edge")
    for axis in (0, 1):
        length = blurred.shape[axis] - 2 * radius
        parts = [w * np.take(blurred, range(i, i + length), axis) for i, w in enumerate(kernel)]
        blurred = np.sum(parts, axis=0, dtype=np.float32)
    return float(np.mean((luma - blurred) ** 2))


def moved_ratios(gradients: seams.Gradients, tiles: Sequence[Tile], factor: int) -> list[float]:
    """``ratio`` of the same lines moved by 1 to 13 latents, where no tile ends: what the picture alone makes of it.

    One horizon that happens to lie on a border is 8% of the ratio of 40 borders.
    """
    size, found = gradients.size, list[float]()

    def moved(edge: int, length: int, by: int) -> int:
        return edge if edge in (0, length) else min(max(edge + by, factor), length - factor)

    for by in (factor * step for step in range(-MOVED, MOVED + 1) if step):
        lines = [
            tile._replace(
                top=moved(tile.top, size.height, by),
                bottom=moved(tile.bottom, size.height, by),
                left=moved(tile.left, size.width, by),
                right=moved(tile.right, size.width, by),
            )
            for tile in tiles
        ]
        found.append(seams.judge(gradients, lines, factor).ratio)
    return found


def judge_run(run: Path) -> dict[str, Any]:
    """Added detail, borders and specks of a finished run."""
    config, found = load(run / "config.yaml"), {}
    with Image.open(run / "image.png") as picture, Image.open(run / "guide" / "lowres.png") as low:
        large = low.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)
        energies = [high_frequency_energy(one) for one in (picture.convert("RGB"), large)]
        pixels = np.asarray(picture.convert("RGB"))
    found["high_frequency"] = {"picture": energies[0], "lanczos": energies[1], "ratio": energies[0] / energies[1]}
    factor = config.model.vae_scale_factor
    for name, node in (("denoise", config.denoise), ("decode", config.decode)):
        grid = latent_grid(config.width, config.height, node.tile_size, node.overlap, factor)
        tiles = [tile.scaled(factor) for tile in grid]
        seen = seams.measure(seams.picture_strips(run / "image.png"), tiles, factor)
        elsewhere = moved_ratios(seen.gradients, tiles, factor)
        found[f"{name}_seams"] = {
            "ratio": seen.ratio,
            "local_ratio": seen.local_ratio,
            "lattice_ratio": seen.lattice_ratio,
            "median": float(np.median([border.gradient / max(border.aligned, 1e-3) for border in seen.borders])),
            "moved": {"mean": float(np.mean(elsewhere)), "sd": float(np.std(elsewhere))},
        }
    sky = sky_of(pixels)
    found["sky"] = round(float(sky.mean()), 3)
    found["specks"] = [one._asdict() for one in specks(pixels, sky)]
    return found


def judge_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Each run's figures, and their means; ``moved``: the ratio where no tile ends, ``spread``: its standard error."""
    each = {folder.name: judge_run(folder) for folder in folders}
    rows = list(each.values())
    borders = {}
    for name in ("denoise", "decode"):
        some = [row[f"{name}_seams"] for row in rows]
        means = {key: float(np.mean([one[key] for one in some])) for key in ("ratio", "lattice_ratio", "median")}
        spread = float(np.mean([one["moved"]["sd"] ** 2 for one in some]) / len(some)) ** 0.5
        borders[name] = {**means, "moved": float(np.mean([one["moved"]["mean"] for one in some])), "spread": spread}
    detail = float(np.mean([row["high_frequency"]["ratio"] for row in rows]))
    skies = [row for row in rows if row["sky"] > 0.05]
    specked = {"skies": len(skies), "with": sum(bool(row["specks"]) for row in skies)}
    specked["specks"] = sum(len(row["specks"]) for row in skies)
    return {"runs": each, "borders": borders, "detail": detail, "specked": specked}
