"""Latents as the tokens of a transformer: 2x2 of them each. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.tiles import Size

if TYPE_CHECKING:
    from torch import Tensor


def packed(latents: Tensor) -> Tensor:
    """``[N, h * w, 4 C]`` of ``latents [N, C, 2 h, 2 w]``: a token is 2x2 latents."""
    return latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, size: Size) -> Tensor:
    """The reverse of ``packed``; ``size`` in tokens."""
    return tokens.unflatten(1, size).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
