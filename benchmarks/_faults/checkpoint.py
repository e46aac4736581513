"""The smallest checkpoint that has all that a Stable Diffusion has: a look at it takes seconds, a step milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import random_checkpoint as random

LEAST: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"num_hidden_layers": 1},
}


def write(folder: Path) -> Path:
    """A diffusers folder of random float32 weights; returns it."""
    found = random.configs("sd15", small=True)
    for name, config in LEAST.items():
        found[name] |= config
    random.write_small_files(folder, "sd15", found)
    for name, config in found.items():
        entries = [random.Entry(s.name.partition("/")[2], s.shape, (s,)) for s in random.specs(name, config)]
        base = "model" if "encoder" in name else "diffusion_pytorch_model"
        random.write_safetensors(folder / name / f"{base}.safetensors", entries, "fp32", 0)
    return folder
