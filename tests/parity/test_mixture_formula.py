"""One canvas step against the paper's formula, written a second time in a few lines (arXiv 2302.02412)."""

import random

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from files import all_of, rows_of

from stages.canvas.mixture import Grouping, Mixture, grid_views
from stages.tiles import Size, grid

SIZE, SIDE, GUIDANCE = Size(24, 32), Size(16, 16), 6.5


def published(kind, h, w):
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    if kind == "gaussian":
        density = [
            np.exp(-(((a - (n - 1) / 2) / n) ** 2) / (2 * 0.01)) / np.sqrt(2 * np.pi * 0.01)
            for a, n in ((y, h), (x, w))
        ]
        return density[0] * density[1]
    if kind == "quartic":
        u, v = (2 * y - h + 1) / h, (2 * x - w + 1) / w
        return (15 / 16) ** 2 * (1 - u**2) ** 2 * (1 - v**2) ** 2
    return np.ones((h, w))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gaussian", "constant", "quartic"])
def test_a_step_equals_the_formula_in_any_order(unet, kind):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn((1, 4, *SIZE), generator=generator)
    text, nothing = torch.randn((2, 1, 5, 16), generator=generator)
    tiles = grid(SIZE, SIDE, 4)
    assert len(tiles) == 6

    numerator, denominator = np.zeros((4, *SIZE)), np.zeros(SIZE)
    for tile in tiles:
        crop = latents[:, :, tile.top : tile.bottom, tile.left : tile.right]
        eps_u, eps_c = (unet(crop, 500, encoder_hidden_states=e).sample[0].double().numpy() for e in (nothing, text))
        weight = published(kind, *SIDE)
        numerator[:, tile.top : tile.bottom, tile.left : tile.right] += weight * (eps_u + GUIDANCE * (eps_c - eps_u))
        denominator[tile.top : tile.bottom, tile.left : tile.right] += weight
    expected = numerator / denominator

    def denoise(batch):  # sample by sample, so that only the mixing can differ
        embeddings = [nothing if negative else text for negative in batch.unconditional]
        samples = zip(batch.samples.split(1), embeddings, strict=True)
        return torch.cat([unet(sample, 500, encoder_hidden_states=e).sample for sample, e in samples])

    views = grid_views(tiles, SIZE, blend=kind, guidance_scale=GUIDANCE)
    for order in range(3):
        random.Random(order).shuffle(views)
        got = rows_of(latents)
        Mixture(views).predict(rows_of(latents), got, denoise, Grouping(4 - order))
        assert np.abs(all_of(got)[0].numpy() - expected).max() <= 1e-5
