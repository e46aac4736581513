"""The low-res pass: its shapes for canvases of any shape, and that the canvas' settings do not touch it."""

from __future__ import annotations

import pytest
import torch
from in_process import Work
from torch import Tensor

from stages.memory.tensors import read_tensors


def lowres(work: Work, **values: object) -> Tensor:
    found = work.run({"lowres.num_inference_steps": 1, **values}, until="lowres")
    return read_tensors(found["lowres"] / "latents.safetensors")["latents"]


@pytest.mark.parametrize(
    ("canvas", "shape"),
    [((128, 128), (8, 8)), ((256, 128), (6, 11)), ((1024, 64), (4, 64)), ((64, 1024), (64, 4)), ((32, 32), (4, 4))],
)
def test_shape_of_the_canvas_at_the_native_area(work: Work, canvas: tuple[int, int], shape: tuple[int, int]) -> None:
    latents = lowres(work, width=canvas[0], height=canvas[1])
    assert latents.shape == (1, 4, *shape) and latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_settings_of_the_canvas_reuse_the_low_res_pass(work: Work) -> None:
    lowres(work)
    assert work.status == "ran"
    lowres(work, **{"denoise.strength": 0.9, "denoise.guidance_scale": 3.0, "decode.mode": "independent"})
    assert work.status == "reused"
    lowres(work, width=256, height=192)  # the same shape: the same low-res picture
    assert work.status == "reused"
    lowres(work, width=128, height=128)
    assert work.status == "ran"
    lowres(work, seed=1)
    assert work.status == "ran"


def test_guidance_one(work: Work) -> None:
    first = lowres(work, **{"lowres.guidance_scale": 1.0})
    second = lowres(work, **{"lowres.guidance_scale": 1.0, "negative_prompt": "dog"})
    assert torch.equal(first, second)
