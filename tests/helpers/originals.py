"""The names that the authors of transformers give to the tensors that diffusers names otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Table = Mapping[str, str]  # what of a name becomes what, in this order

_FINAL = {r"^norm_out\.linear": "final_layer.adaLN_modulation.1"}
FLUX2: Table = {
    **_FINAL,
    r"^proj_out": "final_layer.linear",
    "^x_embedder": "img_in",
    "^context_embedder": "txt_in",
    r"^time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"^time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"^time_guidance_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"^time_guidance_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"(modulation\w*)\.linear": r"\1.lin",
    "^single_transformer_blocks": "single_blocks",
    "^transformer_blocks": "double_blocks",
    r"attn\.to_qkv_mlp_proj": "linear1",
    r"(single_blocks\.\d+)\.attn\.to_out": r"\1.linear2",
    r"(single_blocks\.\d+)\.attn\.norm_q\.weight": r"\1.norm.query_norm.scale",
    r"(single_blocks\.\d+)\.attn\.norm_k\.weight": r"\1.norm.key_norm.scale",
    r"attn\.to_qkv": "img_attn.qkv",
    r"attn\.add_qkv": "txt_attn.qkv",
    r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
    r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
    r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
    r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
    r"attn\.to_out\.0": "img_attn.proj",
    r"attn\.to_add_out": "txt_attn.proj",
    r"ff\.linear_in": "img_mlp.0",
    r"ff\.linear_out": "img_mlp.2",
    r"ff_context\.linear_in": "txt_mlp.0",
    r"ff_context\.linear_out": "txt_mlp.2",
}
Z_IMAGE: Table = {
    r"^all_final_layer\.2-1": "final_layer",
    r"^all_x_embedder\.2-1": "x_embedder",
    r"attention\.to_out\.0": "attention.out",
    r"attention\.norm_(\w)": r"attention.\1_norm",
    r"attention\.to_qkv": "attention.qkv",
}
SD3: Table = {
    **_FINAL,
    r"^proj_out": "final_layer.linear",
    r"^pos_embed\.pos_embed": "pos_embed",
    r"^pos_embed\.proj": "x_embedder.proj",
    r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    "^transformer_blocks": "joint_blocks",
    r"attn\.add_qkv": "context_block.attn.qkv",
    r"attn\.norm_added_(\w)": r"context_block.attn.ln_\1",
    r"attn\.to_add_out": "context_block.attn.proj",
    r"\.(attn2?)\.to_qkv": r".x_block.\1.qkv",
    r"\.(attn2?)\.norm_(\w)\.": r".x_block.\1.ln_\2.",
    r"\.(attn2?)\.to_out\.0": r".x_block.\1.proj",
    r"\.norm1\.linear": ".x_block.adaLN_modulation.1",
    r"\.norm1_context\.linear": ".context_block.adaLN_modulation.1",
    r"\.ff\.net\.0\.proj": ".x_block.mlp.fc1",
    r"\.ff\.net\.2": ".x_block.mlp.fc2",
    r"\.ff_context\.net\.0\.proj": ".context_block.mlp.fc1",
    r"\.ff_context\.net\.2": ".context_block.mlp.fc2",
}


def originally(weights: Mapping[str, Tensor], table: Table, swapped: str = r"^norm_out\.") -> dict[str, Tensor]:
    """Query, key and value in one; of names that ``swapped`` finds, the second half of the rows first."""
    found = {}
    for name, tensor in weights.items():
        if re.search(r"(to_[kv]|add_[kv]_proj)\.\w+$", name):
            continue
        value, target = tensor, name
        if part := re.search(r"\.(to|add)_q(_proj)?\.(weight|bias)$", name):
            value = torch.cat(
                [weights[name.replace("_q", f"_{one}", 1) if "norm" not in name else name] for one in "qkv"]
            )
            target = f"{name[: part.start()]}.{part[1]}_qkv.{part[3]}"
        for ours, theirs in table.items():
            target = re.sub(ours, theirs, target)
        found[target] = torch.cat(value.chunk(2)[::-1]) if re.search(swapped, name) else value
    return found
