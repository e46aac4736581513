"""Denoisers in the layouts of their authors: every tensor is found, in the order that diffusers wants its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from originals import FLUX2, SD3, Z_IMAGE, Table, originally
from quantised import write_gguf
from safetensors.torch import save_file
from torch import nn
from transformers.models.clip import CLIPTextConfig, CLIPTextModelWithProjection

from stages.memory.tensors import read_tensor
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.models.single_file import denoiser_tensors


def flux2() -> Any:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def z_image() -> Any:
    return ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip


def sd3() -> Any:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("make", "table", "swapped"),
    [
        (flux2, FLUX2, r"^norm_out\."),
        (z_image, Z_IMAGE, r"^$"),
        (sd3, SD3, r"^norm_out\.|^transformer_blocks\.2\.norm1_context"),  # of the last block too
    ],
)
def test_every_tensor(make: Any, table: Table, swapped: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = make()
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    config: Any = model.config
    original = {f"{prefix}{name}": value for name, value in originally(weights, table, swapped).items()}
    assert not original.keys() & weights.keys() or not prefix
    save_file(original, tmp_path / "model.safetensors")
    arrays: dict[str, tuple[np.ndarray[Any, Any], str]] = {
        name: (value.numpy(), "F32") for name, value in original.items()
    }
    write_gguf(tmp_path / "model.gguf", arrays)
    save_file(weights, tmp_path / "ours.safetensors")
    for file in ("model.safetensors", "model.gguf", "ours.safetensors"):
        found = denoiser_tensors(tmp_path / file, None, type(model).__name__, dict(config))
        assert found.keys() == weights.keys()
        assert all(torch.equal(read_tensor(ref), weights[name]) for name, ref in found.items())


def test_another_denoiser_and_a_torn_one(tmp_path: Path) -> None:
    original = originally(sd3().state_dict(), SD3)
    save_file(original, tmp_path / "sd3.safetensors")
    with pytest.raises(CheckpointError, match="holds a SD3Transformer2DModel, expected a FluxTransformer2DModel"):
        denoiser_tensors(tmp_path / "sd3.safetensors", None, "FluxTransformer2DModel", {})
    del original["joint_blocks.1.x_block.attn.qkv.weight"]
    save_file(original, tmp_path / "sd3.safetensors")
    with pytest.raises(CheckpointError, match=r"not a whole model in the original layout: KeyError: 'joint_blocks.1"):
        denoiser_tensors(tmp_path / "sd3.safetensors", None, "SD3Transformer2DModel", {})


def test_the_first_clip_of_sd3_projects_nothing(tmp_path: Path) -> None:
    """As stock single files have it, whatever projection lies in the file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=99, projection_dim=32, **sizes)).eval()
    clip.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    sd3().save_config(tmp_path / "transformer")
    prefix = "text_encoders.clip_l.transformer."
    encoder = {f"{prefix}{name}": value for name, value in clip.state_dict().items()}
    save_file({**originally(sd3().state_dict(), SD3), **encoder}, tmp_path / "sd3.safetensors")
    opened = Checkpoint.open(str(tmp_path / "sd3.safetensors"), config=str(tmp_path), components=("text_encoder",))
    component = opened.component("text_encoder")
    model = component.build()
    model.load_state_dict({name: read_tensor(ref) for name, ref in component.tensors.items()}, assign=True)
    clip.text_projection.weight.data = torch.eye(32)
    ids = torch.tensor([[5, 7, 98]])
    with torch.no_grad():
        assert torch.equal(model(ids).text_embeds, clip(ids).text_embeds)
