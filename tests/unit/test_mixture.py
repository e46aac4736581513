"""The mixing of tiles' predictions, with denoisers whose answer is known."""

import random

import pytest
import torch
from files import all_of, rows_of

from stages.canvas.mixture import Grouping, Mixture, View, batch, grid_views, groups
from stages.canvas.weights import grid_weights
from stages.config import BLENDS
from stages.memory.rows import Window
from stages.tiles import Size, Tile, grid, whole

SIZE = Size(24, 40)
LATENTS = torch.randn((1, 4, *SIZE), generator=torch.Generator().manual_seed(5))


def mixed(views, latents, denoise, group_size):
    total = rows_of(torch.full_like(latents, 7.0))  # what is there goes
    Mixture(views).predict(rows_of(latents), total, denoise, Grouping(group_size))
    return all_of(total)


def pointwise(tiles):
    """A denoiser without context: mixing its tiles must give what it says of the whole canvas."""
    sign = torch.tensor([-1.0 if flag else 1.0 for flag in tiles.unconditional])
    row = torch.tensor(tiles.prompt_rows, dtype=torch.float32)
    return tiles.samples * (0.5 + row)[:, None, None, None] + 0.1 * sign[:, None, None, None]


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("group_size", [1, 3, 100])
def test_mixing_tiles_gives_the_whole(blend, group_size):
    views = grid_views(grid(SIZE, Size(16, 16), 4), SIZE, blend=blend, guidance_scale=3.0)
    got = mixed(views, LATENTS, pointwise, group_size)
    expected = (LATENTS * 0.5 - 0.1) + 3.0 * 0.2
    assert torch.allclose(got, expected, atol=2e-6, rtol=0)


def test_one_view_is_bitwise_the_stock_formula():
    views = grid_views([whole(SIZE)], SIZE, blend="gaussian", guidance_scale=7.5)
    u, c = torch.randn((2, 4, *SIZE)).unbind()

    def denoise(tiles):
        assert torch.equal(tiles.samples, torch.cat([LATENTS] * 2))
        assert tiles.unconditional == (True, False)
        return torch.stack([u, c])

    got = mixed(views, LATENTS, denoise, 1)
    assert torch.equal(got[0], u + 7.5 * (c - u))


def test_pairs_lie_together_and_guidance_one_has_no_unconditional_pass():
    tiles = grid(SIZE, Size(24, 16), 4)
    weights = grid_weights(tiles, SIZE, "constant")
    views = [View(t, w, i, 1.0 if i == 1 else 2.0) for i, (t, w) in enumerate(zip(tiles, weights, strict=True))]
    batches = [batch(Window(rows_of(LATENTS)), group) for group in groups(views, Grouping(8))]
    assert [b.prompt_rows for b in batches] == [(0, 0, 2, 2), (1,)]
    assert [b.unconditional for b in batches] == [(True, False, True, False), (False,)]
    assert batches[0].tiles == (tiles[0], tiles[0], tiles[2], tiles[2])
    assert torch.equal(batches[0].samples[2], LATENTS[0][tiles[2].index])


def test_groups_are_of_one_tile_size():
    small, large = Tile(0, 0, 0, 0, 8, 8), Tile(0, 0, 0, 0, 16, 8)
    weight = grid_weights([whole(Size(8, 8))], Size(8, 8), "constant")[0]
    views = [View(t, weight) for t in (small, large, small, large, small)]
    assert [[v.tile for v in g] for g in groups(views, Grouping(2))] == [[small] * 2, [small], [large] * 2]
    guided = [view._replace(guidance_scale=2.0) for view in views]
    assert [[v.tile for v in g] for g in groups(guided, Grouping(4))] == [[small] * 2, [small], [large] * 2]
    with pytest.raises(ValueError, match="at least one sample"):
        list(groups(views, Grouping(0)))


@pytest.mark.parametrize(
    ("ranks", "count", "how", "expected"),
    [
        (2, 25, Grouping(14, 2), [7, 6, 6, 6]),  # of 7, 7, 7 and 4 one rank would have 14 tiles
        (2, 25, Grouping(28, 2), [13, 12]),
        (3, 25, Grouping(14, 2), [5, 4, 4, 4, 4, 4]),
        (2, 26, Grouping(14, 2), [7, 6, 6, 7]),
        (2, 25, Grouping(28, 8), [8, 8, 4, 5]),  # micro-batches of four tiles stay as they are
        (2, 25, Grouping(2, 8), [1] * 25),
        (4, 3, Grouping(28, 2), [1, 1, 1]),
        (1, 25, Grouping(14, 2), [7, 7, 7, 4]),
    ],
)
def test_ranks_get_as_much(ranks, count, how, expected):
    weight = grid_weights([whole(Size(8, 8))], Size(8, 8), "constant")[0]
    views = [View(Tile(0, i, 0, 0, 8, 8), weight, guidance_scale=2.0) for i in range(count)]
    found = list(groups(views, how, ranks))
    assert [len(group) for group in found] == expected
    assert [view for group in found for view in group] == views


def test_order_of_views_and_earlier_steps_do_not_matter():
    net = torch.nn.Conv2d(4, 4, 3, padding=1)

    def denoise(tiles):
        return net(tiles.samples).detach() + torch.tensor(tiles.unconditional)[:, None, None, None]

    views = grid_views(grid(SIZE, Size(16, 16), 8), SIZE, blend="gaussian", guidance_scale=5.0)
    expected = mixed(views, LATENTS, denoise, 4)
    assert torch.equal(mixed(views, LATENTS, denoise, 4), expected)
    random.Random(1).shuffle(views)
    assert torch.allclose(mixed(views, LATENTS, denoise, 5), expected, atol=1e-6)


def test_wrong_shapes_are_refused():
    mixture = Mixture(grid_views([whole(SIZE)], SIZE, blend="constant", guidance_scale=1))
    with pytest.raises(ValueError, match="expected"):
        mixture.predict(rows_of(LATENTS[..., :-1]), rows_of(LATENTS), pointwise, Grouping(1))
    with pytest.raises(ValueError, match="at least one view"):
        Mixture([])
