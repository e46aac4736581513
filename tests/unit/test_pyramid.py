"""Tiles of a picture for the eye: the picture at every level, whatever strips it comes in."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from stages.picture.pyramid import TILE, Pyramid, halved


def smooth(height, width):
    """Gradients, which JPEG keeps to a level or two."""
    rows, cols = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, cols * 255 // width, (rows + cols) % 512 // 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "strip"), [(1100, 700, 64), (513, 1025, 513), (96, 128, 7), (512, 512, 64)]
)
def test_every_level_is_the_picture(tmp_path, height, width, strip):
    picture = smooth(height, width)
    with Pyramid(tmp_path / "zoom", width, height) as pyramid:
        for top in range(0, height, strip):
            pyramid.write(picture[top : top + strip])
    told = json.loads((tmp_path / "zoom" / "zoom.json").read_text())
    assert (told["width"], told["height"], told["tile"]) == (width, height, TILE)
    for level in range(told["levels"]):
        found = np.empty_like(picture)
        for path in (tmp_path / "zoom" / str(level)).iterdir():
            col, row = map(int, path.stem.split("_"))
            tile = np.asarray(Image.open(path))
            found[row * TILE :][: tile.shape[0], col * TILE :][:, : tile.shape[1]] = tile
        assert np.abs(found.astype(int) - picture).mean() < 2
        assert len(list((tmp_path / "zoom" / str(level)).iterdir())) == -(-picture.shape[0] // TILE) * -(
            -picture.shape[1] // TILE
        )
        picture = halved(picture)
    assert max(picture.shape) <= TILE // 2 + 1 or told["levels"] == 1


def test_memory_is_that_of_two_rows_of_tiles(tmp_path):
    height, width, strip = 2048, 2048, np.zeros((64, 2048, 3), np.uint8)
    tracemalloc.start()
    with Pyramid(tmp_path / "zoom", width, height) as pyramid:
        for _ in range(0, height, 64):
            pyramid.write(strip)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 3 * TILE * width * 1.5
