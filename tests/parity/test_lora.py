"""Adapters against diffusers' ``load_lora_weights`` and ``fuse_lora``, PEFT's own layers and LyCORIS: float32, 1e-4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from in_process import Work
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.memory.tensors import read_tensors
from stages.plans import StagePlan

ONE_TILE = {**small_models.ONE_TILE, "denoise.guidance_scale": 5.0}
KINDS: Mapping[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
FAMILIES = {"sd15": "sd", "sdxl": "sdxl"}
DENOISER = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
TEXT = ("q_proj", "out_proj", "fc1")


def weights(network: Any, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """{module: its weight} of those that an adapter is for."""
    found = {}
    for name, module in network.named_modules():
        if name.endswith(endings) and isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module.weight
    return found


def pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) for a weight."""
    down, up = torch.randn(rank, *weight.shape[1:]), torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2))
    return 0.2 * down, 0.2 * up


def kohya(networks: Mapping[str, Any], rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    """As kohya's trainer saves it: ``networks`` by prefix."""
    found = {}
    for prefix, network in networks.items():
        for name, weight in weights(network, DENOISER if "unet" in prefix else TEXT).items():
            key = f"{prefix}_{name.replace('.', '_')}"
            found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = pair(weight, rank)
            found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


def peft(networks: Mapping[str, Any], rank: int = 4) -> dict[str, Tensor]:
    """As diffusers saves it: ``networks`` by component."""
    found = {}
    for prefix, network in networks.items():
        for name, weight in weights(network, TEXT if "text" in prefix else DENOISER).items():
            found[f"{prefix}.{name}.lora_A.weight"], found[f"{prefix}.{name}.lora_B.weight"] = pair(weight, rank)
    return found


def canvas(work: Work, values: Mapping[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run(dict(values), until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0)


def expected(pipeline: Any, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "prompt": "a cat",
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "width": 128,
        "height": 64,
        "output_type": "latent",
    }
    return pipeline(**options, generator=torch.Generator().manual_seed(7), **arguments).images


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_two_as_diffusers_fuses_them(small: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """One in each naming, of the denoiser and the text encoders, in float16 and float32."""
    folder, pipeline = small(kind), KINDS[kind].from_pretrained(small(kind))
    encoders = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)}
    prefixes = ("lora_te",) if kind == "sd15" else ("lora_te1", "lora_te2")
    torch.manual_seed(1)
    first = kohya({"lora_unet": pipeline.unet, **dict(zip(prefixes, encoders.values(), strict=True))})
    first = {name: tensor.half() for name, tensor in first.items()}
    files = {"a": first, "b": peft({"unet": pipeline.unet, **encoders})}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    strengths = {"a": 0.7, "b": -0.4}
    asked = [{"path": str(tmp_path / f"{name}.safetensors"), "scale": scale} for name, scale in strengths.items()]
    got = canvas(Work(tmp_path, folder), {**ONE_TILE, "model.family": FAMILIES[kind], "model.loras": asked})
    plain = expected(pipeline)
    for name, tensors in files.items():
        pipeline.load_lora_weights(tensors, adapter_name=name)
    pipeline.set_adapters(list(strengths), list(strengths.values()))
    pipeline.fuse_lora(adapter_names=list(strengths))
    want = expected(pipeline)
    assert not close(plain, want)
    assert close(got, want), (got - want).abs().max()
