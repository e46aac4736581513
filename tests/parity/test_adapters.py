"""Adapters against diffusers' ``load_lora_weights`` and ``fuse_lora``, PEFT's own layers and LyCORIS: float32, 1e-4."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import small_flux
import small_models
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from in_process import Work
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.memory.deltas import Delta, add
from stages.memory.tensors import read_header, read_tensors
from stages.plans import StagePlan
from stages.techniques.lora_file import open_adapter

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


def expected(pipeline: Any, guidance_scale: float = 5.0) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"prompt": "a cat", "num_inference_steps": 3, "width": 128, "height": 64, "output_type": "latent"}
    options["generator"] = torch.Generator().manual_seed(7)
    return pipeline(**options, guidance_scale=guidance_scale).images


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


def test_flux_as_diffusers_fuses_it(small: Callable[[str], Path], tmp_path: Path) -> None:
    """Kohya's names, which are those of its authors: query, key and value in one. Beside it PEFT's."""
    folder = tmp_path / "model"
    small_flux.write(folder, small("sd15") / "tokenizer")
    pipeline = FluxPipeline.from_pretrained(folder)
    network = pipeline.transformer
    torch.manual_seed(1)
    rows: dict[str, list[str]] = {"single_blocks.0.linear1": [f"attn.to_{part}" for part in "qkv"] + ["proj_mlp"]}
    rows["double_blocks.1.txt_attn.qkv"] = [f"attn.add_{part}_proj" for part in "qkv"]
    rows["double_blocks.0.img_mlp.2"], rows["single_blocks.1.modulation.lin"] = ["ff.net.2"], ["norm.linear"]
    own, joined = kohya({"lora_te1": pipeline.text_encoder}), {}
    for name, parts in rows.items():
        blocks, index = ("single_" if name.startswith("single") else "") + "transformer_blocks", name.split(".")[1]
        modules = [network.get_submodule(f"{blocks}.{index}.{part}") for part in parts]
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = pair(torch.cat([module.weight for module in modules]), 4)
        found = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        if "linear1" not in name:
            own |= found
            continue
        joined = found  # diffusers' function is written for the width of the published model
        added = (0.7 * 2 / 4 * up @ down).split([len(module.weight) for module in modules])
    second = {f"transformer.{name}": tensor for name, tensor in peft({"": network}).items()}
    second = {name.replace("transformer..", "transformer."): tensor for name, tensor in second.items()}
    save_file({**own, **joined}, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    asked = [f"{tmp_path / 'a.safetensors'}:0.7", f"{tmp_path / 'b.safetensors'}:0.3"]
    got = canvas(Work(tmp_path, folder), {**small_flux.ONE_TILE, "model.loras": asked})
    pipeline.load_lora_weights(own, adapter_name="a")
    pipeline.load_lora_weights(second, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    pipeline.fuse_lora(adapter_names=["a", "b"])
    with torch.no_grad():
        for part, delta in zip(rows["single_blocks.0.linear1"], added, strict=True):
            module = network.get_submodule(f"single_transformer_blocks.0.{part}")
            getattr(module, "base_layer", module).weight += delta
    want = expected(pipeline, guidance_scale=3.5)
    want = FluxPipeline._unpack_latents(want, 64, 128, 8)
    assert close(got, want), (got - want).abs().max()


@pytest.mark.parametrize(
    "layer", [nn.Linear(24, 36, bias=False), nn.Conv2d(8, 12, 3, bias=False)], ids=["linear", "conv"]
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoConModule", {"use_tucker": True}),
        ("LoConModule", {"weight_decompose": True}),
        ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
        ("LohaModule", {"use_tucker": True}),
        ("LohaModule", {"use_tucker": False}),
        ("LokrModule", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
        ("LokrModule", {"lora_dim": 2, "factor": 2, "use_tucker": True}),
        ("LokrModule", {"full_matrix": True}),
    ],
)
def test_as_lycoris_merges_them(tmp_path: Path, layer: Any, kind: str, options: dict[str, Any]) -> None:
    import lycoris

    torch.manual_seed(2)
    module = getattr(lycoris, kind)("lora_unet_layer", layer, **{"lora_dim": 4, "alpha": 2, **options}).eval()
    inputs = torch.randn((3, 24) if isinstance(layer, nn.Linear) else (3, 8, 5, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter).abs() + 0.1)
        want, plain = module(inputs), layer(inputs)
    tensors = {f"lora_unet_layer.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "org_" not in name}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, refs = open_adapter(tmp_path / "a.safetensors"), read_header(tmp_path / "a.safetensors")
    found = adapter.modules["lora_unet_layer"]
    assert found.shape == (len(layer.weight), layer.weight[0].numel())
    delta = Delta({role: refs[name] for role, (name, _) in found.tensors.items()}, 0, 1.0)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        add(merged.weight, [delta])
        got = merged(inputs)
    assert not torch.allclose(want, plain) and torch.allclose(got, want, rtol=1e-4, atol=1e-4), (got - want).abs().max()
