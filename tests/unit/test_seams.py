"""The seam metric sees seams that are there, and only those."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from stages.picture.seam_map import heat_map, plain, table
from stages.picture.seams import Meter, border_positions, measure, picture_strips, psnr
from stages.tiles import Size, Tile, grid

SIZE = Size(300, 420)
TILES = grid(SIZE, Size(150, 150), 20)


def noisy(seed=0):
    y, x = np.mgrid[: SIZE.height, : SIZE.width]
    base = 128 + 50 * np.sin(x / 30) + 40 * np.cos(y / 25)
    noise = np.random.default_rng(seed).normal(0, 8, (*SIZE, 3))
    return (base[..., None] + noise).clip(0, 255).astype(np.uint8)


def split(picture, height):
    return [picture[top : top + height] for top in range(0, len(picture), height)]


def test_a_picture_without_seams():
    report = measure([noisy()], TILES)
    assert report.ratio == pytest.approx(1, abs=0.03) and report.local_ratio == pytest.approx(1, abs=0.03)
    xs, ys = border_positions(TILES, SIZE)
    assert [(b.axis, b.position) for b in report.borders] == [("column", x) for x in xs] + [("row", y) for y in ys]
    assert len(xs) == 6 and 420 not in xs and 0 not in xs


def test_a_seam_is_found_and_located():
    picture = noisy().astype(int)
    tile = TILES[5]
    picture[tile.top : tile.bottom, tile.left : tile.right] += 12  # one tile is a little lighter
    report = measure([picture.clip(0, 255).astype(np.uint8)], TILES)
    assert report.local_ratio > 1.05 and report.ratio > 1.05
    highest = sorted(report.borders, key=lambda b: -b.ratio)[:3]
    edges = {("column", tile.left), ("column", tile.right), ("row", tile.top), ("row", tile.bottom)}
    assert {(b.axis, b.position) for b in highest} <= edges
    assert table(report).splitlines()[2].startswith(f"| {highest[0].axis} | {highest[0].position} |")
    assert highest[0].worst > highest[0].ratio


def test_a_border_that_was_smoothed_is_seen_as_well():
    picture = noisy()
    for x in border_positions(TILES, SIZE)[0]:
        picture[:, x - 2 : x + 2] = picture[:, x - 2 : x - 1]
    assert measure([picture], TILES).local_ratio < 0.7


def gradients(bands):
    meter = Meter(SIZE)
    for band in bands:
        meter.add(band)
    return meter.gradients()


@pytest.mark.parametrize("height", [1, 7, 64, 65, 300])
def test_bands_of_any_height_give_the_same(height):
    picture = noisy()
    whole, parts = gradients([picture]), gradients(split(picture, height))
    assert whole.size == parts.size == SIZE and whole.block == 64
    assert np.array_equal(whole.columns, parts.columns) and np.array_equal(whole.rows, parts.rows)
    grey = picture.astype(np.float64).mean(axis=2)
    assert parts.columns.shape == (5, 419) and parts.rows.shape == (299, 7)
    assert np.allclose(parts.rows[:, 0], np.abs(np.diff(grey[:, :64], axis=0)).mean(axis=1), rtol=1e-4)
    assert np.allclose(parts.columns[4], np.abs(np.diff(grey[256:], axis=1)).mean(axis=0), rtol=1e-4)


def test_large_pictures_have_longer_pieces_not_more():
    meter = Meter(Size(20, 65536))
    meter.add(np.zeros((20, 65536, 3), np.uint8))
    assert meter.block == 512 and meter.gradients().rows.shape == (19, 128)


def test_a_picture_that_is_not_whole_is_refused():
    meter = Meter(SIZE)
    meter.add(noisy()[:100])
    with pytest.raises(ValueError, match="100 rows of a picture of 300"):
        meter.gradients()


def test_plain_values_are_sorted_and_short():
    found = plain(measure([noisy()], TILES))
    ratios = [border["ratio"] for border in found["borders"]]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) == len(measure([noisy()], TILES).borders)
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"ratio", "local_ratio", "lattice_ratio", "borders"}


def test_a_flat_picture_has_no_seam():
    flat = np.full((*SIZE, 3), 90, np.uint8)
    report = measure([flat], TILES)
    assert report.ratio == 1 and report.local_ratio == 1


def test_wrong_sizes_and_single_tiles_are_refused():
    with pytest.raises(ValueError, match="its tiles cover 420x300"):
        measure([noisy()[:-1]], TILES)
    with pytest.raises(ValueError, match="no border"):
        measure([noisy()], [Tile(0, 0, 0, 0, *SIZE)])


def test_the_heat_map_shows_the_border():
    picture = noisy().astype(int)
    picture[:, 150:] += 60
    tiles = [Tile(0, 0, 0, 0, 300, 150), Tile(0, 1, 0, 150, 300, 420)]
    with Image.open(io.BytesIO(heat_map(measure([picture.clip(0, 255).astype(np.uint8)], tiles), side=420))) as image:
        assert image.size == (420, 300)
        red, green, blue = image.getpixel((150, 150))
    assert red == 255 and green < 60 and blue < 60


def test_psnr_and_files(tmp_path):
    picture = noisy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert psnr(picture_strips(tmp_path / "a.png", 64), split(picture, 64)) == float("inf")
    assert psnr([np.zeros((2, 2, 3), np.uint8)], [np.full((2, 2, 3), 255, np.uint8)]) == 0
