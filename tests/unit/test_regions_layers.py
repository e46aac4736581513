"""Regions on the canvas: shares that add up, and prompts where they belong."""

import random

import pytest
import torch
from files import all_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.canvas.mixture import Grouping, Mixture
from stages.canvas.views import region_mask, region_views
from stages.regions.config import Region, Regions, parse
from stages.tiles import Size, Tile

PIXELS, LATENTS, SIDE = Size(512, 1024), Size(64, 128), Size(32, 32)
OPTIONS = {"side": SIDE, "overlap": 8, "blend": "gaussian", "guidance_scale": 4.0}


def total(views, size):
    found = torch.zeros(size)
    for view in views:
        found[view.tile.index] += view.weight.map()
    return found


def say(views, row, size=LATENTS):
    return total([view for view in views if view.prompt_row == row], size)


fractions = st.tuples(*[st.floats(0, 1)] * 4)
shapes = st.sampled_from(["gaussian", "quartic", "cosine", "constant"])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(fractions, shapes, st.sampled_from(["blend", "replace"]), st.integers(0, 40)), max_size=5))
def test_weights_add_up_to_one_for_any_regions(listed):
    regions = []
    for edges, mask, mode, feather in listed:
        (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
        if right - left > 0.1 and bottom - top > 0.1:
            box = [left, top, right, bottom]
            regions.append({"prompt": "x", "box": box, "mask_type": mask, "mode": mode, "feather": feather})
    plan = parse(regions, size=PIXELS, prompt="background")
    for size in (LATENTS, Size(32, 64), Size(24, 40)):
        views = region_views(plan, size, **OPTIONS)
        assert torch.allclose(total(views, size), torch.ones(size), atol=1e-5)
        assert {view.tile.size for view in views} == {Size(min(32, size.height), min(32, size.width))}


def test_two_halves():
    left = {"prompt": "left", "box": [0, 0, 576, 512], "guidance_scale": 1}
    right = {"prompt": "right", "box": [448, 0, 1024, 512]}
    views = region_views(parse([left, right], size=PIXELS), LATENTS, **OPTIONS)
    assert {view.prompt_row for view in views} == {1, 2}
    assert {view.guidance_scale for view in views if view.prompt_row == 1} == {1}
    say_left, say_right = say(views, 1), say(views, 2)
    assert torch.allclose(say_left[:, :56], torch.ones(64, 56), atol=1e-6) and not say_left[:, 72:].any()
    assert torch.allclose(say_right[:, 72:], torch.ones(64, 56), atol=1e-6)
    assert torch.allclose(say_left, say_right.flip(1), atol=1e-6)


def test_replace_covers_and_fades_in():
    patch = {"prompt": "patch", "box": [256, 128, 768, 384], "mode": "replace", "feather": 64}
    views = region_views(parse([patch], size=PIXELS, prompt="all"), LATENTS, **OPTIONS)
    base, over = say(views, 1), say(views, 2)
    assert torch.allclose(over[24:40, 40:88], torch.ones(16, 48), atol=1e-6)
    assert not over[:16].any() and torch.allclose(base[:16], torch.ones(16, 128), atol=1e-6)
    across = over[32, 32:48]
    assert bool((across.diff() >= -1e-6).all()) and 0 < float(across[0]) < 0.2
    covering = {"prompt": "patch", "box": [0, 0, 1, 1], "mode": "replace", "feather": 64}
    views = region_views(parse([covering], size=PIXELS, prompt="all"), LATENTS, **OPTIONS)
    assert {view.prompt_row for view in views} == {2}  # what is covered is not computed; no ramp at the canvas' edge


def test_later_replacements_lie_on_top():
    listed = [{"prompt": str(i), "box": [0, 0, 512, 512], "mode": "replace"} for i in range(2)]
    views = region_views(parse(listed, size=PIXELS, prompt="all"), LATENTS, **OPTIONS)
    assert {view.prompt_row for view in views} == {1, 3}


def test_densities_are_the_published_ones():
    box, whole = Tile(0, 0, 0, 0, 33, 33), Size(64, 64)
    middle = {
        kind: float(region_mask(Region(box=box, prompt="", mask_type=kind, weight=2), box, 0, whole).over(box)[16, 16])
        for kind in ("gaussian", "quartic", "constant")
    }
    assert middle["gaussian"] == pytest.approx(2 * 15.915, rel=1e-3)
    assert middle["quartic"] == pytest.approx(2 * (15 / 16) ** 2)
    assert middle["constant"] == 2


def test_a_step_with_regions_equals_the_formula_in_any_order():
    """Regions of one tile each: eps = sum m_r eps_r / sum m_r, as mixture-of-diffusers computes it."""
    boxes = [(0, 0, 32, 32), (0, 24, 32, 56), (16, 8, 48, 40), (16, 24, 48, 56)]
    kinds = ("gaussian", "quartic", "constant", "gaussian")
    regions = tuple(
        Region(box=Tile(0, 0, *b).scaled(8), prompt=str(i), mask_type=k, weight=1 + i, guidance_scale=2 + i)
        for i, (b, k) in enumerate(zip(boxes, kinds, strict=True))
    )
    size = Size(48, 56)
    background = Region(
        box=Tile(0, 0, 0, 0, 384, 448), prompt="all", mask_type="constant", weight=0.01, guidance_scale=7.5
    )
    latents = torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(0))

    def answer(crop, row, negative):
        return torch.tanh(crop * (row + 1)) - 0.5 * negative

    def denoise(batch):
        rows = zip(batch.samples, batch.prompt_rows, batch.unconditional, strict=True)
        return torch.stack([answer(crop, names[row], negative) for crop, row, negative in rows])

    numerator, denominator = torch.zeros((4, *size), dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for index, region in enumerate((background, *regions)):
        box = Tile(0, 0, *(edge // 8 for edge in region.box[2:]))
        crop = latents[0][box.index]
        eps = answer(crop, index, True) + region.guidance_scale * (
            answer(crop, index, False) - answer(crop, index, True)
        )
        mask = region_mask(region, box, 0, size).over(Tile(0, 0, 0, 0, *box.size))
        numerator[box.index] += mask * eps.double()
        denominator[box.index] += mask
    expected = numerator / denominator
    order = list(enumerate((background, *regions)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        names = {row + 1: index for row, (index, _) in enumerate(order)}
        plan = Regions(size=Size(384, 448), factor=8, main=("", ""), regions=tuple(r for _, r in order))
        views = region_views(plan, size, **OPTIONS)
        got = rows_of(latents)
        Mixture(views).predict(rows_of(latents), got, denoise, Grouping(3))
        assert float((all_of(got)[0] - expected).abs().max()) <= 1e-5


def test_without_regions_it_is_the_plain_grid():
    plan = Regions(size=PIXELS, factor=8, main=("x", ""), regions=())
    views = region_views(plan, LATENTS, **OPTIONS)
    assert {(view.prompt_row, view.guidance_scale, view.weight.mask) for view in views} == {(0, 4.0, None)}
    assert torch.allclose(total(views, LATENTS), torch.ones(LATENTS), atol=1e-6)
