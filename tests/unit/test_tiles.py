"""Properties of the grid: it covers, shares what was asked, and is evenly spread."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.tiles import Size, Tile, grid, latent_grid, needed, spread, whole


@st.composite
def axes(draw):
    tile = draw(st.integers(1, 64))
    return draw(st.integers(1, 30 * tile)), tile, draw(st.integers(0, tile - 1))


@settings(deadline=None)
@given(axes())
def test_an_axis_is_covered_by_even_full_tiles(axis):
    length, tile, overlap = axis
    spans = spread(length, tile, overlap)
    side = min(tile, length)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert {end - start for start, end in spans} == {side}
    steps = [b[0] - a[0] for a, b in itertools.pairwise(spans)]
    if steps:
        assert side - max(steps) >= overlap
        assert max(steps) - min(steps) <= 1
        # one tile less would not cover with that overlap
        assert (len(spans) - 1) * (tile - overlap) + overlap < length


@settings(deadline=None)
@given(axes(), axes())
def test_a_grid_is_the_product_of_its_axes(rows, cols):
    size, side = Size(rows[0], cols[0]), Size(rows[1], cols[1])
    overlap = min(rows[2], cols[2], min(side) - 1)
    tiles = grid(size, side, overlap)
    spans = [((t.top, t.bottom), (t.left, t.right)) for t in tiles]
    vertical, horizontal = spread(size.height, side.height, overlap), spread(size.width, side.width, overlap)
    assert spans == [(v, h) for v in vertical for h in horizontal]
    assert len({t.name for t in tiles}) == len(tiles)
    assert [(t.row, t.col) for t in tiles] == sorted((t.row, t.col) for t in tiles)


def test_names_and_boxes():
    tile = Tile(3, 12, 4, 8, 20, 28)
    assert tile.name == "r03_c12"
    assert tile.size == (16, 20)
    assert tile.slices == (slice(4, 20), slice(8, 28))
    assert tile.scaled(8)[2:] == (32, 64, 160, 224)
    grown = tile.grown(6, Size(24, 100))
    assert grown[2:] == (0, 2, 24, 34)
    assert tile.within(grown)[2:] == (4, 6, 20, 26)
    with pytest.raises(ValueError, match="does not lie in"):
        grown.within(tile)


def test_needed_are_the_tiles_that_share_a_place():
    tiles = grid(Size(10, 30), Size(10, 10), 0)
    assert [t.col for t in needed(tiles, Tile(0, 0, 0, 9, 10, 20))] == [0, 1]
    assert needed(tiles, whole(Size(10, 30))) == tiles


@pytest.mark.parametrize(
    ("width", "height", "count"), [(256, 8192, 43), (8192, 256, 43), (264, 264, 4), (64, 2048, 11)]
)
def test_extreme_canvases(width, height, count):
    tiles = latent_grid(width, height, 256, 64, 8)
    assert len(tiles) == count
    assert max(t.bottom for t in tiles) * 8 == height
    assert max(t.right for t in tiles) * 8 == width


@pytest.mark.parametrize("bad", [(250, 256, 256, 64), (256, 256, 100, 64), (256, 256, 256, 4)])
def test_pixels_between_latents_are_refused(bad):
    with pytest.raises(ValueError, match="multiple of 8"):
        latent_grid(*bad, 8)


@pytest.mark.parametrize("bad", [(0, 4, 0), (4, 0, 0), (10, 4, 4), (10, 4, -1)])
def test_axes_that_cannot_work_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        spread(*bad)


@pytest.mark.parametrize(("length", "tile", "overlap", "step"), [(96, 64, 16, 2), (250, 64, 15, 2), (40, 64, 16, 4)])
def test_edges_on_a_step(length: int, tile: int, overlap: int, step: int) -> None:
    found = spread(length, tile, overlap, step)
    assert all(start % step == end % step == 0 for start, end in found)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(a[1] - b[0] >= overlap for a, b in itertools.pairwise(found))


def test_sides_that_are_no_multiple_of_the_step() -> None:
    with pytest.raises(ValueError, match="multiples of 2, got 95 and 64"):
        spread(95, 64, 16, 2)
