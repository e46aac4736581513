"""Dilated sampling: a global look at the canvas in every step (DemoFusion, arXiv 2311.16973, section 3.4).

Every ``scale``-th latent of the canvas, both ways, makes a small canvas that shows the whole picture: ``scale^2`` of
them, interleaved. The denoiser predicts each, and their predictions join the tiles' with a weight that falls as the
noise does: what the picture shows is then decided together, and detail by the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from stages.canvas.guides import skip_residual_weight
from stages.canvas.layers import region_views
from stages.canvas.mixture import Mixture, TileBatch, View
from stages.canvas.region_scale import scaled
from stages.canvas.regions import from_config
from stages.canvas.tiles import Size, Tile

_REACH = 6  # standard deviations: what the gaussian has beyond is under float32's rounding


def dilation(size: Size, side: int) -> int:
    """How many latents of a canvas of ``size`` make one of its sub-canvases, whose short side is then a tile's."""
    return max(1, min(size) // side)


def dilated_views(config: DictConfig) -> tuple[int, Size, list[View]]:
    """(dilation, size of a sub-canvas in latents, views of all sub-canvases laid out side by side) of a config.

    Regions lie in every sub-canvas where they lie on the canvas. No views: the term is off, or the canvas is not two
    tiles high and wide and has no sub-canvas.
    """
    denoise, factor = config.denoise, config.model.vae_scale_factor
    size, side = Size(config.height // factor, config.width // factor), denoise.tile_size // factor
    scale = dilation(size, side)
    small = Size(-(-size.height // scale), -(-size.width // scale))
    if not denoise.dilated.enabled or scale == 1:
        return 1, size, []
    views = region_views(
        scaled(from_config(config), Size(small.height * factor, small.width * factor)),
        small,
        side=Size(side, side),
        overlap=denoise.overlap // factor,
        blend=denoise.blend,
        guidance_scale=denoise.guidance_scale,
    )
    return scale, small, laid_out(views, scale, small)


def laid_out(views: list[View], scale: int, small: Size) -> list[View]:
    """The views of one sub-canvas, moved to the place of each of the ``scale^2`` that ``spread_out`` puts together."""
    found = []
    for place in range(scale * scale):
        down, across = place // scale * small.height, place % scale * small.width
        for view in views:
            row, col, top, left, bottom, right = view.tile
            tile = Tile(row, col, top + down, left + across, bottom + down, right + across)
            found.append(view._replace(tile=tile))
    return found


def blurred(latents: Tensor, scale: int, sigma: float) -> Tensor:
    """``latents [1, C, H, W]`` through a gaussian of ``sigma`` latents, at most ``2 scale - 1`` wide, with the mean and
    deviation that they had: a sub-canvas has one latent of ``scale``, and should speak for those between."""
    radius = min(scale - 1, math.ceil(_REACH * sigma))
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    found = latents
    for axis, pad in ((-2, (0, 0, radius, radius)), (-1, (radius, radius, 0, 0))):
        length, wide = found.shape[axis], F.pad(found, pad, mode="replicate")
        found = torch.zeros_like(latents)
        for offset, share in enumerate((kernel / kernel.sum()).tolist()):
            found.add_(wide.narrow(axis, offset, length), alpha=share)
        del wide
    std, mean = torch.std_mean(latents)
    own_std, own_mean = torch.std_mean(found)
    return found.sub_(own_mean).mul_(std / own_std.clamp_min(1e-6)).add_(mean)


def spread_out(latents: Tensor, scale: int, small: Size) -> Tensor:
    """The sub-canvases of ``latents [1, C, H, W]`` side by side, ``[1, C, scale h, scale w]``: number (i, j) has
    the latents (i + k scale, j + l scale). Places beyond the canvas get its last row and column."""
    below, right = scale * small.height - latents.shape[-2], scale * small.width - latents.shape[-1]
    padded = F.pad(latents, (0, right, 0, below), mode="replicate")
    cut = padded.view(1, -1, small.height, scale, small.width, scale).permute(0, 1, 3, 2, 5, 4)
    return cut.reshape(1, -1, scale * small.height, scale * small.width)


def gathered(mosaic: Tensor, scale: int, small: Size, size: Size) -> Tensor:
    """The reverse of ``spread_out``: a canvas of ``size``."""
    cut = mosaic.view(1, -1, scale, small.height, scale, small.width).permute(0, 1, 3, 2, 5, 4)
    return cut.reshape(1, -1, scale * small.height, scale * small.width)[..., : size.height, : size.width]


class Dilated:
    """The global term of one canvas.

    Args:
        scale, small, views: as ``dilated_views`` gives them.
        channels: of the latents.
        cosine_scale: exponent of the term's weight ``c^cosine_scale``, ``c = (1 + cos(pi (T - t)/T))/2``.
        sigma: of the blur in latents where the noise is strongest; it falls to 1% with ``c^sigma_scale``.
    """

    def __init__(
        self,
        scale: int,
        small: Size,
        views: list[View],
        channels: int,
        *,
        cosine_scale: float = 1.0,
        sigma: float = 0.8,
        sigma_scale: float = 1.0,
    ) -> None:
        self._scale, self._small = scale, small
        self._powers, self._sigma = (cosine_scale, sigma_scale), sigma
        self._mixture = Mixture(views, Size(small.height * scale, small.width * scale), channels)

    @classmethod
    def of(cls, config: DictConfig) -> Dilated | None:
        """As a config says; None where the term is off or the canvas too small for it."""
        scale, small, views = dilated_views(config)
        d = config.denoise.dilated
        options = {"cosine_scale": d.cosine_scale, "sigma": d.sigma, "sigma_scale": d.sigma_scale}
        return cls(scale, small, views, config.model.latent_channels, **options) if views else None

    def mix(
        self,
        prediction: Tensor,
        latents: Tensor,
        denoise: Callable[[TileBatch], Tensor],
        timestep: float,
        num_train_timesteps: int,
        group_size: int,
    ) -> Tensor:
        """``(1 - c^a) prediction + c^a dilated``, in place.

        The paper mixes what the scheduler makes of both predictions; the canvas being the same, mixing them before
        its one step is the same for steps that are linear in the prediction. The paper pads the canvas with zeros;
        here its edge goes on.

        Args:
            prediction: of the tiles, ``[1, C, H, W]`` float32; overwritten.
            latents: ``[1, C, H, W]`` float32, scaled by ``scheduler.scale_model_input``.
            denoise, group_size: see ``Mixture.predict``.
            timestep: of this step, of ``num_train_timesteps``.
        """
        weight, narrow = (skip_residual_weight(timestep, num_train_timesteps, power) for power in self._powers)
        if weight <= 0:
            return prediction
        size = Size(latents.shape[-2], latents.shape[-1])
        soft = blurred(latents, self._scale, self._sigma * (0.99 * narrow + 0.01))
        mosaic = spread_out(soft, self._scale, self._small)
        del soft
        found = self._mixture.predict(mosaic, denoise, group_size)
        return prediction.lerp_(gathered(found, self._scale, self._small, size), weight)
