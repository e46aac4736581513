"""FLUX.1 against the stock pipeline: same weights, same seed, float32; full-size blocks on meta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from in_process import Work
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5TokenizerFast
from transformers.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stages.families.facts import FACTS
from stages.families.flow import packed, unpacked
from stages.families.flux import FAMILY
from stages.memory.layout import Layout
from stages.memory.tensors import TensorRef, read_tensors
from stages.memory.units import rungs, split_units
from stages.models.checkpoint import Checkpoint, construct
from stages.models.large import without_large
from stages.plans import ModelPlan, StagePlan
from stages.tiles import Size

ONE_TILE = {
    "model.family": "flux",
    "model.latent_channels": 16,
    "model.patch": 2,
    "model.size_multiple": 16,
    "scheduler.class_name": None,
    "width": 128,
    "height": 64,
    "guide.mode": "none",
    "denoise.tile_size": 128,
    "denoise.overlap": 32,
    "denoise.num_inference_steps": 3,
    "denoise.guidance_scale": 3.5,
    "seed": 7,
    "technique.channels_last": False,
}


@pytest.fixture(scope="module", params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, small: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    """A tiny random checkpoint, as the stock classes write it."""
    to = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    dev = request.param == "dev"
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    kind: Any = AutoencoderKL
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1022,
            eos_token_id=1023,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=1100, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    letters = [*((chr(code), -2.0) for code in range(97, 123)), ("▁", -2.0)]
    tokenizer_2 = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters])
    for model in (transformer, vae, clip, t5):
        model.eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=vae,
        text_encoder=clip,
        tokenizer=CLIPTokenizer.from_pretrained(small("sd15") / "tokenizer"),
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(to)
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
