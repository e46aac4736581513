"""LinFusion folders as they are published, of random numbers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def features(x: Tensor, weights: dict[str, Tensor], kind: str) -> Tensor:
    """``elu(W (x + f(x))) + 1`` of queries or keys."""
    names = {name.removeprefix(f"to_{kind}_."): value for name, value in weights.items() if f"to_{kind}_." in name}
    h = x @ names["0.weight"].T + names["0.bias"]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h * names["1.weight"] + names["1.bias"]
    h = torch.where(h > 0, h, 0.01 * h) @ names["3.weight"].T + names["3.bias"]
    y = (x + h) @ weights[f"to_{kind}.weight"].T
    return torch.where(y > 0, y + 1, y.exp())


def by_hand(x: Tensor, weights: dict[str, Tensor], heads: int, of: Tensor | None = None) -> Tensor:
    """The published formula, ``[B, N, C]``, quadratic and head by head; ``of``: tokens that are attended to."""
    of = x if of is None else of
    q, k, v = features(x, weights, "q"), features(of, weights, "k"), of @ weights["to_v.weight"].T
    found = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        shares = a @ b.transpose(1, 2) / of.shape[1]
        found.append(shares @ c / (shares.sum(-1, keepdim=True) + 1e-4))
    return torch.cat(found, -1) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


def published(folder: Path) -> list[tuple[Part, dict[str, Tensor]]]:
    """Each module of a folder with its weights, as they are named there."""
    listed, tensors = json.loads((folder / "config.json").read_text())["modules_list"], load_file(folder / WEIGHTS)
    return [
        (
            Part(one["module_name"], one["dim_n"], one["heads"], one["projection_mid_dim"] or one["dim_n"]),
            {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{index}.")},
        )
        for index, one in enumerate(listed)
    ]
