"""How files of adapters (LoRA and its kin) name the modules of each family. No torch.

Trainers of the original repositories write names of the original layout; those of the stock networks need no table.
"""

from __future__ import annotations

from collections.abc import Mapping

_BLOCK = "transformer_blocks.#."
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FLUX_ATTENTION = {
    "double_blocks_#_img_attn_qkv": (_BLOCK, *_QKV),
    "double_blocks_#_txt_attn_qkv": (_BLOCK, *_ADDED),
    "double_blocks_#_img_attn_proj": (_BLOCK, "attn.to_out.0"),
    "double_blocks_#_txt_attn_proj": (_BLOCK, "attn.to_add_out"),
    "img_in": ("", "x_embedder"),
    "txt_in": ("", "context_embedder"),
    "final_layer_linear": ("", "proj_out"),
}
# class of a denoiser -> {its original name, # a number: (what the stock names begin with, and how they go on)}
ORIGINALS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": {
        **_FLUX_ATTENTION,
        "double_blocks_#_img_mlp_0": (_BLOCK, "ff.net.0.proj"),
        "double_blocks_#_img_mlp_2": (_BLOCK, "ff.net.2"),
        "double_blocks_#_txt_mlp_0": (_BLOCK, "ff_context.net.0.proj"),
        "double_blocks_#_txt_mlp_2": (_BLOCK, "ff_context.net.2"),
        "double_blocks_#_img_mod_lin": (_BLOCK, "norm1.linear"),
        "double_blocks_#_txt_mod_lin": (_BLOCK, "norm1_context.linear"),
        "single_blocks_#_linear1": (f"single_{_BLOCK}", *_QKV, "proj_mlp"),
        "single_blocks_#_linear2": (f"single_{_BLOCK}", "proj_out"),
        "single_blocks_#_modulation_lin": (f"single_{_BLOCK}", "norm.linear"),
        "time_in_in_layer": ("time_text_embed.", "timestep_embedder.linear_1"),
        "time_in_out_layer": ("time_text_embed.", "timestep_embedder.linear_2"),
        "vector_in_in_layer": ("time_text_embed.", "text_embedder.linear_1"),
        "vector_in_out_layer": ("time_text_embed.", "text_embedder.linear_2"),
        "guidance_in_in_layer": ("time_text_embed.", "guidance_embedder.linear_1"),
        "guidance_in_out_layer": ("time_text_embed.", "guidance_embedder.linear_2"),
    },
    "Flux2Transformer2DModel": {
        **_FLUX_ATTENTION,
        "double_blocks_#_img_mlp_0": (_BLOCK, "ff.linear_in"),
        "double_blocks_#_img_mlp_2": (_BLOCK, "ff.linear_out"),
        "double_blocks_#_txt_mlp_0": (_BLOCK, "ff_context.linear_in"),
        "double_blocks_#_txt_mlp_2": (_BLOCK, "ff_context.linear_out"),
        "single_blocks_#_linear1": (f"single_{_BLOCK}", "attn.to_qkv_mlp_proj"),
        "single_blocks_#_linear2": (f"single_{_BLOCK}", "attn.to_out"),
    },
    "SD3Transformer2DModel": {
        "joint_blocks_#_x_block_attn_qkv": (_BLOCK, *_QKV),
        "joint_blocks_#_x_block_attn2_qkv": (_BLOCK, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks_#_context_block_attn_qkv": (_BLOCK, *_ADDED),
        "joint_blocks_#_x_block_attn_proj": (_BLOCK, "attn.to_out.0"),
        "joint_blocks_#_x_block_attn2_proj": (_BLOCK, "attn2.to_out.0"),
        "joint_blocks_#_context_block_attn_proj": (_BLOCK, "attn.to_add_out"),
        "joint_blocks_#_x_block_mlp_fc1": (_BLOCK, "ff.net.0.proj"),
        "joint_blocks_#_x_block_mlp_fc2": (_BLOCK, "ff.net.2"),
        "joint_blocks_#_context_block_mlp_fc1": (_BLOCK, "ff_context.net.0.proj"),
        "joint_blocks_#_context_block_mlp_fc2": (_BLOCK, "ff_context.net.2"),
        "joint_blocks_#_x_block_adaLN_modulation_1": (_BLOCK, "norm1.linear"),
        "joint_blocks_#_context_block_adaLN_modulation_1": (_BLOCK, "norm1_context.linear"),
    },
    "ZImageTransformer2DModel": {
        f"{part}_#_attention_{name}": (f"{part}.#.", *found)
        for part in ("layers", "noise_refiner", "context_refiner")
        for name, found in {
            "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
            "out": ("attention.to_out.0",),
        }.items()
    },
}
# what the names of a file tell: (a part of a name, the family)
SIGNS = (
    ("double_blocks", "FLUX"),
    ("single_transformer_blocks", "FLUX"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("attn_add_q_proj", "a transformer such as Stable Diffusion 3"),
    ("attention_to_q", "Z-Image"),
    ("attention_qkv", "Z-Image"),
)
# width of the text that a UNet attends to -> whose
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
