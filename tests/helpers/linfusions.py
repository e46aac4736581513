"""LinFusion folders as they are published, of random numbers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.techniques.linfusion import WEIGHTS, Part


def parts(network: nn.Module, hidden: int | None = None) -> list[dict[str, Any]]:
    """A ``modules_list`` of all of a UNet's self-attention."""
    found = [(name, module) for name, module in network.named_modules() if name.endswith("attn1")]
    return [
        {"module_name": name, "dim_n": one.to_q.in_features, "heads": one.heads, "projection_mid_dim": hidden}  # type: ignore[union-attr]
        for name, one in found
    ]


def tensors(listed: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Shapes by their names in the file."""
    return {
        f"{index}.{there}": shape
        for index, one in enumerate(listed)
        for _, there, shape in Part(
            one["module_name"], one["dim_n"], one["heads"], one["projection_mid_dim"] or one["dim_n"]
        ).shapes()
    }


def write_config(folder: Path, listed: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": listed}))
    return folder


def write_random(folder: Path, network: nn.Module, hidden: int | None = None) -> Path:
    from safetensors.torch import save_file

    listed, draw = parts(network, hidden), torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(shape, generator=draw) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        for name, shape in tensors(listed).items()
    }
    write_config(folder, listed)
    save_file(weights, folder / WEIGHTS)
    return folder


def write_hollow(folder: Path, network: nn.Module) -> Path:
    """Zeros that take no disk."""
    listed, header, end = parts(network), {}, 0
    for name, shape in tensors(listed).items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    file = write_config(folder, listed) / WEIGHTS
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with file.open("r+b") as sized:
        sized.truncate(8 + len(text) + end)
    return folder
