"""Attention as sums over keys: linear in the number of tokens (LinFusion, arXiv 2409.02097).

``out = q (sum k^T v / N) / (q (sum k / N)^T + 1e-4)`` with ``q = elu(W_q (x + f_q(x))) + 1``, ``k`` likewise,
``v = W_v x`` and ``f = Linear -> LayerNorm -> LeakyReLU -> Linear``. What a token knows of all others are two means, so
the others may lie in tiles that are never in memory together.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4


class Exchange(Protocol):
    """What knows of the tokens of other tiles."""

    def weights(self, tokens: Tensor) -> Tensor:
        """``[B, N]``: how much each of the ``tokens [B, N, width]`` at hand counts."""
        ...

    def means(self, values: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of all tiles, from those of the tiles at hand: ``[B, heads, d, d]`` and ``[B, heads, d]``."""
        ...


class LinearKeys(nn.Module):
    """What a tile's tokens say: the means of ``k^T v`` and of ``k``."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.to_k_ = projection(width, hidden)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, heads, d, d]`` and ``[B, heads, d]`` of ``tokens [B, N, width]``; ``weights [B, N]``: 1 without."""
        keys = _split(F.elu(self.to_k(tokens + self.to_k_(tokens))) + 1, self.heads)
        if weights is not None:
            keys = keys * weights[:, None, :, None].to(keys.dtype)
        values, share = _split(self.to_v(tokens), self.heads), tokens.shape[1] ** -0.5  # twice: half floats overflow
        return (keys * share).transpose(-2, -1) @ (values * share), keys.mean(dim=-2)


class LinearQueries(nn.Module):
    """What a tile's tokens make of the means."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.to_q_ = projection(width, hidden)

    def forward(self, tokens: Tensor, values: Tensor, keys: Tensor) -> Tensor:
        """``[B, N, width]`` of ``tokens [B, N, width]`` and what ``LinearKeys`` gave."""
        queries = _split(F.elu(self.to_q(tokens + self.to_q_(tokens))) + 1, self.heads)
        found = queries @ values / (queries @ keys[..., None] + EPSILON)
        return self.to_out(found.transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """In the place of a self-attention of ``width`` channels; ``hidden``: width inside of ``f``, -1 for none of it."""

    exchange: Exchange | None = None  # None: each tile attends to itself

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.keys, self.queries = LinearKeys(width, heads, hidden), LinearQueries(width, heads, hidden)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """``[B, N, width]`` of the same; masks and the rest of what diffusers gives belong to cross-attention."""
        if self.exchange is None:
            return self.queries(hidden_states, *self.keys(hidden_states))
        weights = self.exchange.weights(hidden_states)
        values, keys = self.keys(hidden_states, weights)
        return self.queries(hidden_states, *self.exchange.means(values, keys, weights))


def projection(width: int, hidden: int) -> nn.Module:
    """``f``; without it a token counts twice."""
    if hidden == -1:
        return nn.Identity()
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, width))


def _split(tokens: Tensor, heads: int) -> Tensor:
    """``[B, heads, N, d]`` of ``[B, N, heads * d]``."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
