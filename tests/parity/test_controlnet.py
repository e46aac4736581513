"""ControlNets against the stock pipelines: same weights, same seed, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from in_process import Work
from PIL import Image
from torch import Tensor

from stages.memory.tensors import read_tensors

ONE_TILE = {**small_models.ONE_TILE, "denoise.guidance_scale": 5.0}
STOCK = {"sd15": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the canvas' size."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    Image.fromarray(pixels).resize((128, 64), Image.Resampling.BICUBIC).save(path)
    return path


def stock(small: Callable[[str], Path], kind: str, pipeline: Any = None, nets: int = 1) -> Any:
    net = ControlNetModel.from_pretrained(small(f"{kind}_controlnet"))
    more = {"add_watermarker": False} if kind == "sdxl" else {}
    made = (pipeline or STOCK[kind]).from_pretrained(small(kind), controlnet=net if nets == 1 else [net] * nets, **more)
    made.set_progress_bar_config(disable=True)
    return made


def expected(pipeline: Any, **arguments: Any) -> Tensor:
    common = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    return pipeline(**{**common, **arguments}, generator=torch.Generator().manual_seed(7)).images


def canvas(work: Work, values: dict[str, Any]) -> Tensor:
    found = work.run(values, until="denoise")
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({}, {}),
        (
            {"scale": 0.6, "start": 0.2, "end": 0.8},
            {"controlnet_conditioning_scale": 0.6, "control_guidance_start": 0.2, "control_guidance_end": 0.8},
        ),
    ],
    ids=["whole", "part"],
)
def test_text_to_image(
    small: Callable[[str], Path], tmp_path: Path, image: Path, kind: str, asked: Any, arguments: Any
) -> None:
    net = {"path": str(small(f"{kind}_controlnet")), "image": str(image)}
    values = {**ONE_TILE, "model.family": kind.removesuffix("15"), "model.controlnets": [{**net, **asked}]}
    got = canvas(Work(tmp_path, small(kind)), values)
    with Image.open(image) as shown:
        want = expected(stock(small, kind), image=shown, width=128, height=64, **arguments)
    close(got, want)
    del values["model.controlnets"]
    assert (canvas(Work(tmp_path, small(kind)), values) - got).abs().max() > 0.1


def test_two_of_them_over_a_guide_are_image_to_image(small: Callable[[str], Path], tmp_path: Path, image: Path) -> None:
    """The second one is shown what is enlarged: the person's picture."""
    kind, path = "sd15", str(small("sd15_controlnet"))
    asked = [{"path": path, "image": str(image), "scale": 0.5}, {"path": path, "guide": True, "end": 0.9}]
    values = {**ONE_TILE, "guide.mode": "sdedit", "guide.image": str(image), "denoise.strength": 0.7}
    values |= {"model.controlnets": asked, "scheduler.class_name": "DDIMScheduler", "denoise.num_inference_steps": 6}
    found = Work(tmp_path, small(kind)).run(values, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    got = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    pipeline = stock(small, kind, StableDiffusionControlNetImg2ImgPipeline, 2)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with Image.open(image) as shown:
        want = expected(
            pipeline,
            image=guide,
            control_image=[shown, shown],
            controlnet_conditioning_scale=[0.5, 1.0],
            control_guidance_end=[1.0, 0.9],
            strength=0.7,
            num_inference_steps=6,
        )
    close(got, want)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_one_file_in_the_original_layout(small: Callable[[str], Path], tmp_path: Path, image: Path, kind: str) -> None:
    """It says nothing of its network: that is as the UNet's."""
    folder, file = small(f"{kind}_controlnet"), tmp_path / "alone.safetensors"
    file.symlink_to(folder / f"{kind}_controlnet.safetensors")
    found = [
        canvas(Work(tmp_path / str(number), small(kind)), {**ONE_TILE, "model.controlnets": [asked]})
        for number, asked in enumerate({"path": str(path), "image": str(image)} for path in (file, folder))
    ]
    assert torch.equal(*found)
