"""Dilated sampling against a reference of its own (scipy, slices), on any canvas; and what a config makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import all_of, rows_of
from in_process import small_config
from scipy import ndimage
from torch import Tensor

from stages.canvas.dilated import (
    Dilated,
    blurred,
    dilated_views,
    dilation,
    gathered_row,
    gaussian,
    laid_out,
    spread_row,
)
from stages.canvas.mixture import Grouping, TileBatch, grid_views
from stages.config import ROOT, ConfigError
from stages.job import Job
from stages.tiles import Size, grid

TILE = 8
SIZES = [Size(16, 16), Size(24, 24), Size(19, 35), Size(40, 17)]


def canvas(size: Size) -> Tensor:
    return torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(7))


def predict(batch: TileBatch) -> Tensor:
    """Depends on a whole sample, as a denoiser does; the unconditional half differs."""
    sign = torch.tensor([-0.2 if flag else 0.3 for flag in batch.unconditional])[:, None, None, None]
    return torch.tanh(batch.samples + batch.samples.mean((-2, -1), keepdim=True) + sign)


def whole(sample: np.ndarray, guidance: float) -> np.ndarray:
    """The guided prediction of one sample ``[C, h, w]``."""
    mean = sample.mean((-2, -1), keepdims=True)
    low, high = np.tanh(sample + mean - 0.2), np.tanh(sample + mean + 0.3)
    return low + guidance * (high - low)


def reference(prediction: np.ndarray, latents: np.ndarray, s: int, t: float, sigma: float) -> np.ndarray:
    """DemoFusion's term in few lines, for square canvases that are whole tiles: each sub-canvas is one sample."""
    c = (1 + math.cos(math.pi * (1000 - t) / 1000)) / 2
    kernel = np.exp(-(np.arange(-s + 1, s) ** 2) / (2 * (sigma * (0.99 * c + 0.01)) ** 2))
    kernel /= kernel.sum()
    soft = latents
    for axis in (-2, -1):
        soft = ndimage.convolve1d(soft, kernel, axis=axis, mode="nearest")
    soft = (soft - soft.mean()) / soft.std() * latents.std() + latents.mean()
    found = prediction.copy()
    for i in range(s):
        for j in range(s):
            found[..., i::s, j::s] = (1 - c) * prediction[..., i::s, j::s] + c * whole(soft[0, :, i::s, j::s], 3.0)[
                None
            ]
    return found


def term(size: Size, **options: Any) -> Dilated:
    """Without regions or config: the views of a grid in each sub-canvas."""
    scale = dilation(size, TILE)
    small = Size(-(-size.height // scale), -(-size.width // scale))
    views = grid_views(grid(small, Size(TILE, TILE), 2), small, blend="gaussian", guidance_scale=3.0)
    return Dilated(scale, small, laid_out(views, scale, small), 4, **options)


def mixed(one: Dilated, prediction: Tensor, latents: Tensor, timestep: float, group: int) -> Tensor:
    rows = rows_of(prediction)
    one.mix(rows, rows_of(latents), predict, timestep, 1000, Grouping(group))
    return all_of(rows)


@pytest.mark.parametrize("timestep", [999.0, 500.0, 20.0])
@pytest.mark.parametrize("scale", [2, 3])
def test_equals_the_reference(scale: int, timestep: float) -> None:
    size = Size(TILE * scale, TILE * scale)
    latents, prediction = canvas(size), canvas(size).flip(-1)
    expected = reference(prediction.double().numpy(), latents.double().numpy(), scale, timestep, 0.8)
    got = mixed(term(size, sigma=0.8), prediction, latents, timestep, 3)
    assert np.abs(got.double().numpy() - expected).max() < 1e-5
    assert float((got - prediction).abs().max()) > 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_every_latent_is_in_one_sub_canvas(size: Size) -> None:
    """With a denoiser that gives its samples back and a blur that does nothing, the term is the canvas."""
    scale = dilation(size, TILE)
    assert scale >= 2
    row = canvas(size)[:, :, :1]
    width = -(-size.width // scale)
    side_by_side = spread_row(row, scale, width)
    assert torch.equal(gathered_row(side_by_side, scale, width, size.width), row)
    own = row[..., 1::scale]  # number 1
    assert torch.equal(side_by_side[..., width : width + own.shape[-1]], own)
    one, rows = term(size, sigma=1e-6, sigma_scale=1e-9), rows_of(torch.zeros((1, 4, *size)))
    one.mix(rows, rows_of(canvas(size)), lambda batch: batch.samples, 1000.0, 1000, Grouping(3))
    assert torch.allclose(all_of(rows), canvas(size), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_any_canvas_group_and_bands_give_the_same(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (mixed(term(size), canvas(size), canvas(size), 600.0, group) for group in (1, 50))
    assert torch.equal(one, other) and one.shape == (1, 4, *size) and bool(one.isfinite().all())
    monkeypatch.setattr("stages.memory.rows.BAND", 3 * size.width)
    banded = mixed(term(size), canvas(size), canvas(size), 600.0, 50)
    assert torch.allclose(banded, one, atol=1e-6, rtol=0)


def test_the_blur_falls_and_a_strip_is_that_of_the_whole() -> None:
    latents, steps = canvas(Size(32, 48)), []
    for sigma in (0.008, 0.4, 0.8):
        kernel = gaussian(4, sigma)
        soft = blurred(rows_of(latents), 0, 32, kernel)
        steps.append(float((soft[..., 1:] - soft[..., :-1]).abs().mean()))
        for top, bottom in ((0, 5), (7, 20), (29, 32)):
            assert torch.equal(blurred(rows_of(latents), top, bottom, kernel), soft[:, :, top:bottom])
    assert torch.allclose(blurred(rows_of(latents), 0, 32, gaussian(4, 0.008)), latents, atol=1e-5)
    assert steps[0] > steps[1] > steps[2]


def config_with(tmp_path: Path, **values: Any) -> Any:
    plain = {"denoise.dilated.enabled": True, "width": 256, "height": 192, "guide.mode": "none"}
    return small_config(ROOT / "models" / "embedded", tmp_path, {**plain, **values})


def made(tmp_path: Path, **values: Any) -> Any:
    """The arguments of what a config makes: itself, and its regions."""
    config = config_with(tmp_path, **values)
    return config, Job.of(config).regions


def test_a_config_makes_it(tmp_path: Path) -> None:
    scale, small, views = dilated_views(*made(tmp_path))
    assert (scale, small) == (3, Size(8, 11)) and len(views) == 9 * 2
    total = torch.zeros((24, 33))
    for view in views:
        assert view.tile.size == Size(8, 8)  # as the tiles of the canvas: one shape for the denoiser
        total[view.tile.slices] += view.weight.map()
    assert torch.allclose(total, torch.ones(()), atol=1e-6)
    assert Dilated.of(*made(tmp_path, **{"denoise.dilated.enabled": False})) is None
    assert Dilated.of(*made(tmp_path, height=120)) is None  # not two tiles high


def test_regions_lie_in_every_sub_canvas(tmp_path: Path) -> None:
    halves = [{"prompt": "sea", "box": [0, 0, 128, 192]}, {"prompt": "sand", "box": [128, 0, 256, 192]}]
    _, small, views = dilated_views(*made(tmp_path, regions=halves, prompt=""))
    said = torch.zeros((24, 33))
    for view in views:
        if view.prompt_row == 2:
            said[view.tile.slices] += view.weight.map()
    middle = small.width // 2
    for left in (0, small.width, 2 * small.width):
        assert float(said[:, left : left + middle].max()) == 0
        assert torch.allclose(said[:, left + middle + 1 : left + small.width], torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("key", ["cosine_scale", "sigma", "sigma_scale"])
def test_numbers_that_cannot_work_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"denoise\.dilated\.{key}: got 0.0, expected more than 0"):
        config_with(tmp_path, **{f"denoise.dilated.{key}": 0.0})
