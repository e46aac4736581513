"""Where the latents of a canvas lie: in files as the VAE has them, in the sampler as the denoiser does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from torch import Tensor, empty_like

Change = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """The denoiser's, where it has statistics of its own; else both are the same.

    ``patch``: noise is drawn for places of so many latents a side, ``[1, C * patch**2, H / patch, W / patch]``.
    ``mean``, ``std``: ``[C, patch, patch]`` of the VAE's latents by where they lie in their place.
    """

    patch: int = 1
    mean: Tensor | None = None
    std: Tensor | None = None

    def inside(self, rows: Tensor, top: int) -> Tensor:
        """Of the VAE's ``rows [1, C, h, W]``, which begin at row ``top`` of the canvas, the denoiser's."""
        return self._changed(rows, top, lambda latents, mean, std: (latents - mean) / std)

    def outside(self, rows: Tensor, top: int) -> Tensor:
        """The reverse of ``inside``."""
        return self._changed(rows, top, lambda latents, mean, std: latents * std + mean)

    def _changed(self, rows: Tensor, top: int, change: Change) -> Tensor:
        if self.mean is None or self.std is None:
            return rows
        found = empty_like(rows)
        for y, x in product(range(self.patch), repeat=2):
            place = (..., slice((y - top) % self.patch, None, self.patch), slice(x, None, self.patch))
            found[place] = change(rows[place], *(of[:, y, x, None, None] for of in (self.mean, self.std)))
        return found
