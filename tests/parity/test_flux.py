"""FLUX.1 against the stock pipeline: same weights, same seed, float32; full-size blocks on meta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_flux
import torch
from controlnets import guided, piped
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline, FluxPipeline
from in_process import Work
from small_flux import ONE_TILE
from torch import Tensor

from stages.families.facts import FACTS
from stages.families.flux import FAMILY
from stages.families.tokens import packed, unpacked
from stages.memory.layout import Layout
from stages.memory.tensors import TensorRef, read_tensors
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint
from stages.models.component import construct
from stages.models.large import without_large
from stages.plans import ModelPlan, StagePlan
from stages.tiles import Size


@pytest.fixture(scope="module", params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, small: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    """A tiny random checkpoint, as the stock classes write it."""
    to = tmp_path_factory.mktemp(request.param)
    small_flux.write(to, small("sd15") / "tokenizer", dev=request.param == "dev")
    return to


def stock(folder: Path, kind: Any = FluxPipeline, **arguments: Any) -> Tensor:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.5, "width": 128, "height": 64}
    found = pipeline(**{**given, **arguments}, generator=torch.Generator().manual_seed(7), output_type="latent").images
    return FluxPipeline._unpack_latents(found, 64, 128, 8)


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and want.std() > 0.1
    assert torch.allclose(got, want, atol=1e-4 * max(1.0, float(want.std())), rtol=0), (got - want).abs().max()


def test_text_to_image(folder: Path, tmp_path: Path) -> None:
    got = canvas(Work(tmp_path, folder), {})
    close(got, stock(folder))
    again = canvas(Work(tmp_path, folder), {"prompt": "sea"})
    close(again, stock(folder, prompt="sea"))
    assert not torch.allclose(got, again, atol=1e-3)
    other = canvas(Work(tmp_path, folder), {"denoise.guidance_scale": 1.5})
    dev = Checkpoint.open(str(folder), components=("transformer",)).config("transformer")["guidance_embeds"]
    assert torch.equal(other, got) is not dev  # guidance is an input of dev alone


def test_image_to_image(folder: Path, tmp_path: Path) -> None:
    work = Work(tmp_path, folder)
    values = {**ONE_TILE, "guide.mode": "sdedit", "denoise.strength": 0.5, "lowres.num_inference_steps": 1}
    found = work.run(values, until="denoise")
    guide = read_tensors(found["guide"] / "latents.safetensors")["latents"]
    got = read_tensors(found["denoise"] / "canvas.safetensors")["latents"]
    close(got, stock(folder, FluxImg2ImgPipeline, image=guide, strength=0.5))


def test_streamed_as_resident(folder: Path, tmp_path: Path) -> None:
    """Tiles on whole tokens, leaves at a time, another group: the same bits, and a picture."""
    values = {**ONE_TILE, "denoise.tile_size": 64, "denoise.overlap": 16}
    resident = canvas(Work(tmp_path / "resident", folder), values, {"denoise": StagePlan(micro_batch=1, group_size=3)})
    plan = ModelPlan(resident=(), unit_limit=0, ring_bytes=400_000)
    streamed = {"denoise": StagePlan(models={"transformer": plan}, micro_batch=1, group_size=2)}
    assert torch.equal(canvas(Work(tmp_path / "streamed", folder), values, streamed), resident)
    found = Work(tmp_path / "resident", folder).run({**values, "decode.tile_size": 64}, until="decode")
    assert read_tensors(found["decode"] / "tiles" / "r00_c00.safetensors")["pixels"].float().std() > 1


def test_the_family_is_found(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder), components=FACTS["flux"].opened)
    assert FAMILY.refuse(checkpoint, FACTS["flux"].opened) is None


def test_packing_is_stocks() -> None:
    latents = torch.randn(2, 16, 6, 10)
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpacked(tokens, Size(3, 5)), latents)


def test_units_of_the_full_size() -> None:
    """dev in bf16: blocks whole, and leaves of less than 96 MB, whatever the checkpoint's."""
    network = construct("FluxTransformer2DModel", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True})
    refs = {
        name: TensorRef(Path("none"), 0, torch.bfloat16, tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
    }
    without_large(network, refs, torch.bfloat16)
    layout = Layout(network, torch.bfloat16, channels_last=False)
    blocks = FAMILY.blocks("transformer")
    assert 23.7e9 < layout.nbytes < 23.9e9
    whole = {unit.name: unit.nbytes for unit in split_units(network, layout, blocks, layout.nbytes)}
    assert sum(name.startswith("transformer_blocks.") for name in whole) == 19
    assert 679e6 < whole["transformer_blocks.0"] < 681e6 and 282e6 < whole["single_transformer_blocks.0"] < 284e6
    found = rungs(network, layout, blocks)
    assert len(found) <= 6 and found[-1] < 96_000_000


def test_a_controlnet_adds_to_its_blocks(folder: Path, tmp_path: Path) -> None:
    pipeline = FluxControlNetPipeline.from_pretrained(folder, controlnet=None)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    net: Any = FluxControlNetModel.from_transformer(pipeline.transformer, **sizes)
    small_flux.stirred(net)
    net.save_pretrained(tmp_path / "net")
    got, guide = guided(Work(tmp_path, folder), ONE_TILE, tmp_path / "net", 0.6, tmp_path)
    found = piped(pipeline, net, guide, 0.6, guidance_scale=3.5)
    close(got, FluxPipeline._unpack_latents(found, 64, 128, 8))
    assert (stock(folder) - got).abs().max() > 0.01
