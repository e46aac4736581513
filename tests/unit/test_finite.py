"""Numbers that cannot be a picture end the stage and say where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from files import rows_of
from torch import Tensor

from stages.canvas.mixture import Grouping, Mixture, TileBatch, grid_views
from stages.canvas.sampler import Sampler
from stages.config import ROOT
from stages.families.schedules import Schedule, make_scheduler
from stages.memory.finite import refuse_absurd, refuse_not_finite
from stages.models.checkpoint import Checkpoint
from stages.tiles import Size, grid
from stages.vae.exact_vae import exact_decode, exact_encode
from stages.vae.tiled import decode_tiled, encode_tiled

SIZE = Size(12, 20)
CONFIG = ROOT / "stages" / "models" / "configs" / "sd15"
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers_of_any_size_pass(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for values in (torch.zeros(0), torch.randn(4, 4), torch.full((9,), most)):  # the last one's sum overflows
        refuse_not_finite(values.to(dtype), "tile")
    refuse_absurd(torch.full((2, 2), -60.0, dtype=dtype), "tile")


@pytest.mark.parametrize("bad", [*BAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_found(bad: float, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5).to(dtype)
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"tile 7: 1 of 15 numbers are NaN or infinite.*technique.dtype=fp32"):
        refuse_not_finite(values, "tile 7")


def test_infinities_that_cancel_are_found() -> None:
    with pytest.raises(ValueError, match="2 of 2"):
        refuse_not_finite(torch.tensor([float("inf"), float("-inf")]), "tile")


def sampler(folder: Path) -> Sampler:
    views = grid_views(grid(SIZE, Size(8, 8), 2), SIZE, blend="gaussian", guidance_scale=2.0)
    noise = rows_of(torch.randn((1, 4, *SIZE)))
    return Sampler(
        schedule=Schedule(make_scheduler(Checkpoint(CONFIG), "DDIMScheduler", {})),
        mixture=Mixture(views),
        num_inference_steps=3,
        noise=noise,
        generator=torch.Generator(),
        folder=folder,
    )


def test_a_prediction_names_its_step_and_tile(tmp_path: Path) -> None:
    work = sampler(tmp_path)

    def denoise(batch: TileBatch, timestep: Tensor) -> Tensor:
        found = torch.zeros_like(batch.samples)
        if work.step == 1 and batch.tiles[0].name == "r01_c02":
            found[1, 2, 3, 4] = float("nan")
        return found

    work.advance(denoise, Grouping(1))
    with pytest.raises(ValueError, match="step 2 of 3, tile r01_c02: prediction: 1 of 512 numbers"):
        work.advance(denoise, Grouping(1))
    again = sampler(tmp_path)
    assert again.resume() and again.step == 1  # what was finished before is kept


def test_latents_that_the_scheduler_spoils_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = sampler(tmp_path)
    monkeypatch.setattr(work.schedule.scheduler, "step", lambda prediction, *_, **__: (prediction / 0,))
    with pytest.raises(ValueError, match="step 1 of 3, rows 0 to 12: latents after the scheduler's step"):
        work.advance(lambda batch, timestep: torch.ones_like(batch.samples), Grouping(2))
    assert not list(tmp_path.glob("odd_*"))


@pytest.fixture
def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()


@torch.inference_mode()
@pytest.mark.parametrize("bad", BAD)
def test_pixels_and_latents_of_a_vae(vae: Any, bad: float, tmp_path: Path) -> None:
    canvas, pixels, taken = rows_of(torch.randn(1, 4, *SIZE)), torch.rand(1, 3, 24, 40), SimpleNamespace(rows=[])

    def put(top: int, rows: Tensor) -> None:
        taken.rows.append(rows)

    vae.decoder.conv_out.bias[0], vae.encoder.conv_out.bias[0] = bad, bad
    with pytest.raises(ValueError, match="tile r00_c00: pixels of the VAE's decoder"):
        decode_tiled(vae, canvas, 8, put, shared=False)
    with pytest.raises(ValueError, match="row 0: pixels of the VAE's decoder"):
        exact_decode(vae, canvas.read, SIZE, tmp_path / "decode")
    with pytest.raises(ValueError, match="tile r00_c00: latents of the VAE's encoder"):
        encode_tiled(vae, lambda box: pixels[box.index], grid(SIZE, Size(8, 8), 2), 2, canvas)
    with pytest.raises(ValueError, match="row 0: latents of the VAE's encoder"):
        exact_encode(vae, lambda top, bottom: pixels[:, :, top:bottom], SIZE, tmp_path / "encode", put)
    assert not taken.rows


@torch.inference_mode()
@pytest.mark.parametrize("size", [1e4, -1e30])
def test_absurd_latents_are_not_decoded(vae: Any, size: float, tmp_path: Path) -> None:
    canvas = rows_of(torch.full((1, 4, *SIZE), size))
    with pytest.raises(ValueError, match="tile r00_c00 of the VAE's decoder: latents reach 1e"):
        decode_tiled(vae, canvas, 8, lambda top, rows: None, shared=False)
    with pytest.raises(ValueError, match="of the canvas: latents reach 1e"):
        exact_decode(vae, canvas.read, SIZE, tmp_path)
