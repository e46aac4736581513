"""Properties of the blend weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.canvas.weights import grid_weights, profile, shares, tile_weights, weight_sum
from stages.config import BLENDS
from stages.tiles import Size, grid, whole


@settings(deadline=None)
@given(st.sampled_from(BLENDS), st.integers(1, 200))
def test_profiles_are_symmetric_and_positive_and_highest_in_the_middle(kind, length):
    p = profile(kind, length)
    assert p.shape == (length,) and bool((p > 0).all())
    assert torch.allclose(p, p.flip(0), rtol=1e-12, atol=0)
    assert p.argmax() in ((length - 1) // 2, length // 2) or kind == "constant"


def test_tile_weights_are_float32_and_keep_the_gaussians_corner():
    weight = tile_weights("gaussian", Size(64, 64))
    assert weight.dtype == torch.float32
    assert 0 < float(weight[0, 0]) < 1e-9
    assert float(weight.half()[0, 0]) == 0  # why it is never kept in fp16


@settings(deadline=None)
@given(
    st.sampled_from(BLENDS),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.integers(0, 39),
)
def test_a_grids_weights_add_up_to_one_and_equal_the_published_ratio(kind, size, side, overlap):
    size, side = Size(*size), Size(*side)
    tiles = grid(size, side, min(overlap, min(side) - 1))
    weights = grid_weights(tiles, size, kind)
    total, reference = torch.zeros(size), weight_sum(tiles, size, kind)
    for tile, weight in zip(tiles, weights, strict=True):
        total[tile.index] += weight.map()
        ratio = tile_weights(kind, tile.size) / reference[tile.index]
        assert torch.allclose(weight.map(), ratio, rtol=1e-4, atol=1e-6)
    assert torch.allclose(total, torch.ones(size), atol=1e-5, rtol=0)  # up to 400 tiles overlap


@pytest.mark.parametrize("kind", BLENDS)
def test_a_place_in_one_tile_weighs_exactly_one(kind):
    size = Size(5, 20)
    (only,) = grid_weights([whole(size)], size, kind)
    assert torch.equal(only.map(), torch.ones(size))
    left, right = shares([(0, 12), (8, 20)], 20, kind)
    assert torch.equal(left[:8], torch.ones(8, dtype=torch.float64))
    assert torch.equal(right[4:], torch.ones(8, dtype=torch.float64))


def test_holes_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"places \[4\] of 8"):
        shares([(0, 4), (5, 8)], 8, "gaussian")
    with pytest.raises(ValueError, match="not a grid"):
        grid_weights(grid(Size(4, 4), Size(2, 2), 0)[:3], Size(4, 4), "constant")
    with pytest.raises(ValueError, match="got 'linear'"):
        profile("linear", 4)
