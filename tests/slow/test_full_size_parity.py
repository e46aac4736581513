"""Once at full size: streamed under 800 MB, the canvas is what the stock pipeline computes with 4 GB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Command
from diffusers import DDIMScheduler, StableDiffusionPipeline

from stages.config import ROOT
from stages.memory.tensors import read_tensors


@pytest.mark.slow
def test_full_size_canvas_is_the_stock_pipelines(full_size: Path, tmp_path: Path) -> None:
    command = Command(ROOT / "runner.py", tmp_path, full_size)
    process = command.start(
        *("run=x", "stage=[text_encode,denoise]", "prompt=a cat", "model=sd15", "width=256", "height=256", "seed=3"),
        *("guide.mode=none", "denoise.num_inference_steps=2", "technique.dtype=fp32", "scheduler=ddim"),
        *("technique.channels_last=false", "denoise.tile_size=256"),
    )
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    got = read_tensors(tmp_path / "x" / "denoise" / "canvas.safetensors")["latents"]
    pipeline = StableDiffusionPipeline.from_pretrained(full_size, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        "a cat",
        num_inference_steps=2,
        guidance_scale=7.5,
        width=256,
        height=256,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    # latents of random weights are several times those of trained ones
    assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.std()))
