"""Configs of the checkpoints that ``random_checkpoint`` writes: as published, smaller, or with fewer layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stages.models.controlnets import as_unet
from stages.models.single_file import CONFIGS

Configs = dict[str, dict[str, Any]]  # by component

KINDS = ("sd15", "sd21", "sdxl", "sd3", "flux", "flux2_klein", "z_image")
CONTROLNETS = {"sd15_controlnet": "sd15", "sd21_controlnet": "sd21", "sdxl_controlnet": "sdxl"}  # of UNets
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "num_hidden_layers")  # keys that count equal blocks
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 1024,
    "projection_dim": 16,
}
_T5 = {"vocab_size": 1100, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
_QWEN3 = {
    "vocab_size": 1100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
}
_SMALL: Configs = {
    "unet": {
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "sample_size": 16,
    },
    "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "sample_size": 128},
    "text_encoder": _CLIP,
    "text_encoder_2": {**_CLIP, "hidden_size": 48},  # stock single files tell the two by it
}
_SMALL_KINDS: dict[str, Configs] = {
    "sd21": {"unet": {"attention_head_dim": [2, 4, 4, 4]}},
    "sdxl": {
        "unet": {
            "block_out_channels": [16, 32, 32],
            "attention_head_dim": [2, 4, 4],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 80,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        }
    },
    "sd3": {
        "transformer": {
            "sample_size": 16,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 80,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 24,
            "dual_attention_layers": [0, 1],
        },
        "text_encoder_3": {**_T5, "d_model": 80},
    },
    "flux": {
        "transformer": {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
        "text_encoder_2": {**_T5, "d_model": 48},
    },
    "flux2_klein": {
        "transformer": {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 96,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        "text_encoder": {**_QWEN3, "num_hidden_layers": 28},  # of which the states of three are asked
    },
    "z_image": {
        "transformer": {
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 6, 6],
            "axes_lens": [1024, 64, 64],
        },
        "text_encoder": _QWEN3,
    },
}


def configs(kind: str, *, small: bool = False, layers: Mapping[str, int] | None = None) -> Configs:
    """The configs of the components (a folder with several keeps them apart by their names).

    ``layers``: component -> how many blocks of each sort it has at most.
    """
    if kind in CONTROLNETS:
        unet = configs(CONTROLNETS[kind], small=small)["unet"]
        return {"controlnet": {"_class_name": "ControlNetModel", **as_unet(unet)}}
    paths = sorted((CONFIGS / kind).glob("*/config.json"))
    found = {path.parent.name: json.loads(path.read_text()) for path in paths}
    if small:
        for name, config in found.items():
            own = _SMALL_KINDS.get(kind, {}).get(name, {})
            # of an encoder that is no CLIP, nothing is as in one
            config |= own if "num_layers" in own or "head_dim" in own else _SMALL.get(name, {}) | own
    for name, most in (layers or {}).items():
        config = found[name]
        config |= {key: min(config[key], most) for key in DEPTHS if key in config}
        if isinstance(deep := config.get("transformer_layers_per_block"), list):  # of a UNet
            config["transformer_layers_per_block"] = [min(count, most) for count in deep]
        if "dual_attention_layers" in config:
            config["dual_attention_layers"] = [index for index in config["dual_attention_layers"] if index < most]
    return found


def scheduler_config(kind: str) -> dict[str, Any]:
    """Of the checkpoint's scheduler."""
    return json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text())
