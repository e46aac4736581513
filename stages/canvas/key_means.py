"""Means over all tokens of a canvas, from tiles that are never in memory together: linear attention over the whole.

Tokens where tiles overlap count once: each tile's by its share in the mixture, and the shares add up to 1 at every
latent. A token of a coarser level has the mean share of its latents. Both halves of guidance have means of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.canvas.mixture import TileBatch


class CanvasMeans:
    """A ``linear_attention.Exchange``. ``meet`` waits until all tiles of the canvas have come to the same layer."""

    def __init__(self, meet: Callable[[], None]) -> None:
        self._meet = meet
        self._now: tuple[Tensor, tuple[bool, ...]] | None = None  # shares [B, h, w], and which are without the prompt
        self._layer = 0
        self._sums: dict[tuple[int, bool], tuple[Tensor, Tensor, float]] = {}  # of a layer and a half

    def start(self) -> None:
        """A step begins."""
        self._sums.clear()

    def begin(self, batch: TileBatch) -> None:
        """A pass over some of the tiles begins."""
        self._now = torch.stack([weight.map() for weight in batch.weights]), batch.unconditional
        self._layer = 0

    def weights(self, tokens: Tensor) -> Tensor:
        """``[B, N]``: the share of each of ``tokens [B, N, width]``."""
        if tokens.is_meta:  # a look
            return tokens.new_empty(tokens.shape[:2])
        assert self._now is not None
        shares, count = self._now[0], tokens.shape[1]
        height, width = shares.shape[1:]
        for level in range(16):
            side = 1 << level
            if -(-height // side) * -(-width // side) == count:
                found = F.avg_pool2d(shares[:, None], side, ceil_mode=True, count_include_pad=False)
                return found.flatten(1)
        raise ValueError(f"{count} tokens are no level of a tile of {height}x{width} latents.")

    def means(self, values: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the whole canvas for each sample, from each sample's own; ``weights`` are its tokens' shares.

        Added up sample by sample in float32, so that the size of the groups makes no difference.
        """
        if values.is_meta:
            return torch.empty_like(values), torch.empty_like(keys)
        now, layer, tokens = self._now, self._layer, weights.shape[1]
        assert now is not None
        for value, key, half, total in zip(values, keys, now[1], weights.double().sum(dim=1).tolist(), strict=True):
            known = self._sums.get((layer, half), (0.0, 0.0, 0.0))
            found = value.float() * tokens, key.float() * tokens, total
            self._sums[layer, half] = tuple(a + b for a, b in zip(known, found, strict=True))  # type: ignore[assignment]
        self._sums = {at: sums for at, sums in self._sums.items() if at[0] >= layer - 1}  # some still read the last
        self._meet()
        self._now, self._layer = now, layer + 1
        whole = [self._sums[layer, half] for half in now[1]]
        return (
            torch.stack([(value / total).to(values.dtype) for value, _, total in whole]),
            torch.stack([(key / total).to(keys.dtype) for _, key, total in whole]),
        )
