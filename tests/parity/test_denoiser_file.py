"""A quantised FLUX.1 in the files that people have, against the stock pipeline with the same numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_flux
import torch
from diffusers import FluxPipeline
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from in_process import Work
from quantised import blocks, write_gguf
from safetensors.torch import load_file, save_file
from small_flux import ONE_TILE, originally
from torch import Tensor

from stages.families.flux import FAMILY
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_tensors
from stages.models.checkpoint import Checkpoint
from stages.models.loading import build
from stages.plans import ModelPlan, StagePlan

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(small: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    to = tmp_path_factory.mktemp("flux")
    small_flux.write(to, small("sd15") / "tokenizer", head=128, joint=256)
    return to


class Stored(NamedTuple):
    """A file of quantised weights, and the numbers that they are."""

    path: Path
    numbers: dict[str, Tensor]


@pytest.fixture(scope="module", params=["Q4_K", "Q8_0", "F8_E4M3"])
def stored(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: Any) -> Stored:
    """The transformer in the original layout; its large weights quantised."""
    kind, weights, numbers, raw = request.param, load_file(folder / WEIGHTS), {}, {}
    eight = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}.get(kind)
    for seed, (name, value) in enumerate(sorted(weights.items())):
        if value.dim() < 2 or value.shape[1] % 256:
            raw[name] = numbers[name] = value
        elif eight:
            raw[name] = (value / scale(name)).to(eight)
            numbers[name] = raw[name].float() * scale(name)
        else:
            drawn = blocks(kind, tuple(value.shape), seed, float(value.std()))
            raw[name] = torch.from_numpy(drawn)
            numbers[name] = torch.from_numpy(dequantize(drawn, GGMLQuantizationType[kind]))
    to, original = tmp_path_factory.mktemp("stored"), originally(raw)
    if eight:
        scales = {
            name.replace(".weight", ".scale_weight"): torch.tensor(scale(name))
            for name, value in original.items()
            if value.dtype == eight
        }
        save_file({**original, **scales, "scaled_fp8": torch.empty(0, dtype=eight)}, to / "flux.safetensors")
        return Stored(to / "flux.safetensors", numbers)
    arrays: dict[str, tuple[np.ndarray[Any, Any], str]] = {
        name: (value.numpy(), kind if value.dtype == torch.uint8 else "F32") for name, value in original.items()
    }
    write_gguf(to / "flux.gguf", arrays)
    return Stored(to / "flux.gguf", numbers)


def scale(name: str) -> float:
    """Of a block, whatever it is called."""
    block = re.search(r"_blocks\.(\d)\.", name)
    return 0.5 + int(block[1]) if block else 1.0


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def test_canvas(folder: Path, stored: Stored, tmp_path: Path) -> None:
    """Equal to the stock pipeline with the dequantised weights; block by block the same bits."""
    pipeline: Any = FluxPipeline.from_pretrained(folder)
    pipeline.transformer.load_state_dict(stored.numbers)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.5, "width": 128, "height": 64}
    found = pipeline(**given, generator=torch.Generator().manual_seed(7), output_type="latent").images
    want = FluxPipeline._unpack_latents(found, 64, 128, 8)
    values = {"model.denoiser": str(stored.path)}
    got = canvas(Work(tmp_path / "resident", folder), values)
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-4 * want.std()
    plan = ModelPlan(resident=(), unit_limit=0, ring_bytes=4_000_000)
    streamed = {"denoise": StagePlan(models={"transformer": plan}, micro_batch=1, group_size=1)}
    assert torch.equal(canvas(Work(tmp_path / "streamed", folder), values, streamed), got)
    assert not torch.allclose(canvas(Work(tmp_path / "resident", folder), {}), got, atol=1e-2)  # another model


def test_bytes_of_a_pass(folder: Path, stored: Stored) -> None:
    """As many as the file has, whatever they become."""
    files = {"transformer": str(stored.path)}
    component = Checkpoint.open(str(folder), components=("transformer",), files=files).component("transformer")
    for dtype in (torch.float32, torch.bfloat16):
        built = build(component, dtype=dtype, blocks=FAMILY.blocks("transformer"))
        source = CheckpointSource(built.tensors, built.layout)
        packed = torch.empty(built.layout.nbytes, dtype=torch.uint8)
        source.read(list(built.layout.slots.values()), 0, packed)
        for name, slot in built.layout.slots.items():
            assert torch.equal(slot.view(packed, 0, dtype), stored.numbers[name].to(dtype)), name
        data = sum(ref.nbytes for ref in component.tensors.values())
        assert source.nbytes == data and 0 <= stored.path.stat().st_size - data < 20_000  # its header and scales
        assert data < 0.4 * 4 * sum(value.numel() for value in stored.numbers.values())
        source.close()
