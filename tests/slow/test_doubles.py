"""One lighthouse asked of a canvas of many tiles, one found, however it is guided; without a guide there are more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Work
from PIL import Image

from stages.config import ROOT
from training.finder import count

pytestmark = pytest.mark.slow

MODEL = {  # conf/model/embedded.yaml, few steps; 16 tiles, each of which knows how to paint a lighthouse of its own
    "prompt": "a lighthouse on a cliff at sunset",
    "width": 768,
    "height": 768,
    "model.native_size": 256,
    "model.size_multiple": 32,
    "scheduler.class_name": "DPMSolverMultistepScheduler",
    "lowres.num_inference_steps": 14,
    "lowres.guidance_scale": 4.0,
    "guide.tile_size": 256,
    "guide.phases": [],
    "denoise.num_inference_steps": 10,
    "denoise.strength": 0.3,
    "denoise.guidance_scale": 2.0,
    "decode.tile_size": 288,
}
DILATED = {"denoise.dilated.enabled": True}
STRONG = {"guide.mode": "skip_residual", "denoise.strength": 1.0, "denoise.num_inference_steps": 14}  # as DemoFusion
ONE = {
    "sdedit": {"guide.mode": "sdedit"},
    "hold": {"guide.mode": "hold", "denoise.strength": 0.6, "guide.hold_steps": 0.5},
    "skip_residual": {"guide.mode": "skip_residual"},
    "sdedit, dilated": {"guide.mode": "sdedit", **DILATED},
    "skip_residual from pure noise, dilated": {**STRONG, **DILATED},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Work(tmp_path_factory.mktemp("doubles"), ROOT / "models" / "embedded")
    torch.set_num_threads(threads)


def lighthouses(work: Work, values: dict[str, Any]) -> int:
    picture: Path = work.run({**MODEL, **values})["stitch"] / "image.png"
    with Image.open(picture) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    return count(pixels, "lighthouse")


@pytest.mark.parametrize("way", ONE)
def test_one_lighthouse_is_found(work: Work, way: str) -> None:
    assert lighthouses(work, ONE[way]) == 1


def test_without_a_guide_the_tiles_paint_their_own(work: Work) -> None:
    values = {"guide.mode": "none", "denoise.num_inference_steps": 10, "denoise.guidance_scale": 4.0}
    assert lighthouses(work, values) > 1
