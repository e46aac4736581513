"""A tiny random FLUX.1, as the stock classes write it, and the same weights under the names of its authors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import small_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from small_models import keys_of, letters_t5, stirred, vae_of_sixteen_channels
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from transformers.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ONE_TILE = {**small_models.ONE_TILE, **keys_of("flux", 16), "denoise.guidance_scale": 3.5}


def write(to: Path, tokenizer: Path, *, dev: bool = True, head: int = 16, joint: int = 48, pooled: int = 32) -> None:
    """A diffusers folder. ``tokenizer``: CLIP's; ``head``: channels of each of two heads."""
    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=head,
        num_attention_heads=2,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        guidance_embeds=dev,
        axes_dims_rope=(head // 4, head * 3 // 8, head * 3 // 8),
    )
    vae = vae_of_sixteen_channels(0.3611, 0.1159)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1024,
            hidden_size=pooled,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1022,
            eos_token_id=1023,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=1100, d_model=joint, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    stirred(transformer, vae, clip, t5)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=vae,
        text_encoder=clip,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        text_encoder_2=t5,
        tokenizer_2=letters_t5(),
    ).save_pretrained(to)


def originally(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's weights under the original names: query, key and value in one, shift before scale."""
    rest, found = dict(weights), {}

    def move(ours: str, theirs: str, table: Mapping[str, tuple[str, ...]]) -> None:
        for target, parts in table.items():
            for kind in ("weight", "bias"):
                if f"{ours}{parts[0]}.{kind}" in rest:
                    rows = torch.cat([rest.pop(f"{ours}{part}.{kind}") for part in parts])
                    name = f"{theirs}{target}" + ("" if target.endswith(".scale") else f".{kind}")
                    found[name] = torch.cat(rows.chunk(2)[::-1]) if "adaLN" in target else rows

    for index in range(2):
        move(f"transformer_blocks.{index}.", f"double_blocks.{index}.", _DOUBLE)
        move(f"single_transformer_blocks.{index}.", f"single_blocks.{index}.", _SINGLE)
    move("", "", _WHOLE)
    assert not rest
    return found


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_EMBED = "time_text_embed"
_WHOLE = {
    "time_in.in_layer": (f"{_EMBED}.timestep_embedder.linear_1",),
    "time_in.out_layer": (f"{_EMBED}.timestep_embedder.linear_2",),
    "vector_in.in_layer": (f"{_EMBED}.text_embedder.linear_1",),
    "vector_in.out_layer": (f"{_EMBED}.text_embedder.linear_2",),
    "guidance_in.in_layer": (f"{_EMBED}.guidance_embedder.linear_1",),
    "guidance_in.out_layer": (f"{_EMBED}.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm.scale": ("attn.norm_q",),
    "img_attn.norm.key_norm.scale": ("attn.norm_k",),
    "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*_QKV, "proj_mlp"),
    "norm.query_norm.scale": ("attn.norm_q",),
    "norm.key_norm.scale": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
