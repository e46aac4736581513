"""Names of modules in files of adapters, to those of the stock networks that they are for. No torch before it is asked.

A trainer names what it adds by the module's place, dots or underscores between: such names are looked up as they are.
Those of the original layouts are renamed: of UNets by diffusers' own functions, which work on names alone; of
transformers by the table below, as diffusers' functions multiply weights, which would have to be in memory, and are
written for one width.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

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
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # as diffusers once named them


def flat(name: str) -> str:
    """As kohya's trainer writes it."""
    return name.replace(".", "_")


def targets(
    names: Collection[str], class_name: str, config: Mapping[str, Any], modules: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """{name in a file: the modules, in order, whose rows the delta has}, of those that a network has.

    Args:
        names: without what stands before them for a component.
        config: of the network.
        modules: those of the network that have a weight.
    """
    known = {flat(module): module for module in modules}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        plain = flat(name).replace("_processor_", "_")
        ways = [plain, f"{plain}_0", f"text_model_{plain}", plain.removeprefix("text_model_")]
        ways += [re.sub(rf"_self_attn_{old}$", f"_self_attn_{new}", way) for old, new in _CLIP.items() for way in ways]
        own = next((known[way] for way in ways if way in known), None)
        found[name] = (own,) if own else _original(plain, ORIGINALS.get(class_name, {}), known)
    if class_name.startswith("UNet"):
        rest = [name for name, own in found.items() if not own]
        found |= {name: (known[way],) for name, way in _ldm(rest, config).items() if way in known}
    return {name: own for name, own in found.items() if own}


def _original(plain: str, table: Mapping[str, tuple[str, ...]], known: Mapping[str, str]) -> tuple[str, ...]:
    number = re.search(r"_(\d+)_", plain)
    pattern = plain.replace(number[0], "_#_", 1) if number else plain
    begin, *ends = table.get(pattern) or table.get(plain) or ("",)
    own = [flat((begin + end).replace("#", number[1] if number else "")) for end in ends]
    return tuple(known[name] for name in own) if all(name in known for name in own) else ()


def _ldm(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Of a UNet in its original layout: {name: the stock name, flat}."""
    from diffusers.loaders import lora_conversion_utils

    ending, found = ".lora_down.weight", {}
    keys: dict[str, Any] = {f"lora_unet_{flat(name)}{ending}": name for name in names}
    try:
        described = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
        keys = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(keys, described)
    except (ValueError, IndexError):  # names of another layout
        return {}
    for key, name in keys.items():
        stock = lora_conversion_utils._convert_unet_lora_key(key)
        stock = re.sub(r"[._]lora\.down\.weight$", "", stock).replace(".processor", "")
        found[name] = flat(f"{stock}.0" if stock.endswith("to_out") else stock)
    return found
