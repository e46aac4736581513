"""Position tables that stay in their file: Stable Diffusion 3.5's has a row for each place of a picture of 6144x6144
pixels, 906 MB, and a pass takes the middle of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from stages.memory.refs import TensorRef
from stages.memory.tensors import read_tensor

CROPPED = frozenset({"SD3Transformer2DModel", "SD3ControlNetModel"})  # stock classes that have one


@contextmanager
def tables_unmade() -> Iterator[None]:
    """Stock classes that are made inside get position tables without bytes, and nothing is computed for them: on meta
    that would import torch's graph compiler, 70 MB."""

    def unmade(embed_dim: int, side: int, **_: Any) -> Tensor:
        return torch.empty((side * side, embed_dim), device="meta")

    with patch("diffusers.models.embeddings.get_2d_sincos_pos_embed", unmade):
        yield


class CroppedPositions:
    """``PatchEmbed.cropped_pos_embed`` with the table in its file; a crop is read once for each size.

    Args:
        ref: ``[1, side * side, D]``.
        patch: latents a side of a place.
    """

    def __init__(self, ref: TensorRef, side: int, patch: int) -> None:
        self._ref, self._side, self._patch = ref, side, patch
        self._like, self._known = torch.empty(0), {}

    def before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take note of where and in which dtype the crop is needed."""
        self._like = inputs[0][:0]

    def __call__(self, height: int, width: int) -> Tensor:
        """``[1, h * w, D]``, the middle of the table, for ``height`` x ``width`` latents."""
        h, w, like = height // self._patch, width // self._patch, self._like
        if max(h, w) > self._side:
            raise ValueError(f"{h}x{w} places, expected at most {self._side} a side.")
        if like.is_meta:
            return torch.empty((1, h * w, self._ref.shape[-1]), dtype=like.dtype, device="meta")
        key = (h, w, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = self._read(h, w).to(like.device, like.dtype)
        return self._known[key]

    def _read(self, h: int, w: int) -> Tensor:
        top, left, depth = (self._side - h) // 2, (self._side - w) // 2, self._ref.shape[-1]
        found = torch.empty((1, h * w, depth), dtype=self._ref.read_dtype)
        for y, row in enumerate(found.view(h, w, depth)):
            own = self._ref.piece(((top + y) * self._side + left) * depth, (w, depth))
            if own is None:
                raise ValueError(f"{self._ref.file}: positions in blocks of {self._ref.kind}, expected whole rows.")
            row.copy_(read_tensor(own))
        return found


def keep_in_file(model: nn.Module, tensors: Mapping[str, TensorRef]) -> None:
    """Let ``model``'s position tables, on meta, be read from their file."""
    for name, module in model.named_modules():
        embed: Any = module
        if type(module).__name__ == "PatchEmbed" and embed.pos_embed is not None:
            ref = tensors[f"{name}.pos_embed"]
            crops = CroppedPositions(ref, embed.pos_embed_max_size, embed.patch_size)
            del embed.pos_embed
            embed.pos_embed, embed.cropped_pos_embed = ref, crops  # what is there is not None: it has positions
            embed.register_forward_pre_hook(crops.before)
