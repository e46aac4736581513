"""A picture too large to open, to look at: downscaled, and four crops at full size; read band by band.

python -m benchmarks.look RUN [--out FOLDER] [--side 1024] [--crop 768]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stages.documents import load
from stages.files import atomic_path
from stages.picture.tile_strips import TileStrips
from stages.tiles import latent_grid


def look(run: Path, folder: Path, side: int = 1024, crop: int = 768) -> list[Path]:
    """Write ``small.png`` (at most ``side`` pixels) and ``crop_0.png`` to ``crop_3.png``, from a run's pixel tiles.

    The crops lie in the middle of the picture's quarters; a picture shorter than a crop gives what it has.
    """
    config = load(run / "config.yaml")
    factor, width, height = config.model.vae_scale_factor, config.width, config.height
    tiles = latent_grid(width, height, config.decode.tile_size, config.decode.overlap, factor)
    every = -(-max(width, height) // side)  # pixels, both ways, that become one
    columns = np.arange(0, width, every)
    sums = np.zeros((-(-height // every), len(columns), 3))
    boxes = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    crops = [np.zeros((min(crop, height), min(crop, width), 3), np.uint8) for _ in boxes]
    corners = [(max(0, min(x - crop // 2, width - crop)), max(0, min(y - crop // 2, height - crop))) for x, y in boxes]
    top = 0
    for strip in TileStrips(run / "decode" / "tiles", [tile.scaled(factor) for tile in tiles]):
        across = np.add.reduceat(strip.astype(np.uint32), columns, axis=1)
        np.add.at(sums, (top + np.arange(len(strip))) // every, across)
        for (left, start), part in zip(corners, crops, strict=True):
            first, last = max(top, start), min(top + len(strip), start + len(part))
            if first < last:
                part[first - start : last - start] = strip[first - top : last - top, left : left + part.shape[1]]
        top += len(strip)
    heights = np.diff(np.append(np.arange(0, height, every), height))
    counts = np.multiply.outer(heights, np.diff(np.append(columns, width)))
    pictures = {"small.png": np.rint(sums / counts[..., None]).astype(np.uint8)}
    pictures |= {f"crop_{index}.png": part for index, part in enumerate(crops)}
    for name, pixels in pictures.items():
        with atomic_path(folder / name) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
    return [folder / name for name in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="name of a run, or its folder")
    parser.add_argument("--out", type=Path, help="default: the folder 'look' of the run")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--crop", type=int, default=768)
    given = parser.parse_args()
    run = given.run if given.run.is_dir() else Path("outputs") / given.run
    if not (run / "decode" / "tiles").is_dir():
        sys.exit(f"look: {run / 'decode/tiles'} is missing. Make it: python runner.py run={run.name} prompt=...")
    for path in look(run, given.out or run / "look", given.side, given.crop):
        print(path)


if __name__ == "__main__":
    main()
