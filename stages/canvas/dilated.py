"""Dilated sampling: a global look at the canvas in every step (DemoFusion, arXiv 2311.16973, section 3.4).

Every ``scale``-th latent of the canvas, both ways, makes a small canvas that shows the whole picture: ``scale^2`` of
them, interleaved. The denoiser predicts each, and their predictions join the tiles' with a weight that falls as the
noise does: what the picture shows is then decided together, and detail by the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from stages.canvas.guides import skip_residual_weight
from stages.canvas.mixture import Grouping, Mixture, TileBatch, View
from stages.canvas.views import region_views
from stages.distributed import ALONE, Ranks
from stages.memory.rows import Moments, Rows, bands
from stages.regions.scale import scaled
from stages.regions.types import Regions
from stages.tiles import Size, Tile

_REACH = 6  # standard deviations: what the gaussian has beyond is under float32's rounding


def dilation(size: Size, side: int) -> int:
    """How many latents of a canvas of ``size`` make one of its sub-canvases, whose short side is then a tile's."""
    return max(1, min(size) // side)


def dilated_views(config: DictConfig, regions: Regions) -> tuple[int, Size, list[View]]:
    """(dilation, size of a sub-canvas in latents, views of all sub-canvases laid out side by side) of a config.

    Regions lie in every sub-canvas where they lie on the canvas. No views: the term is off, or the canvas is not two
    tiles high and wide and has no sub-canvas.
    """
    denoise, factor = config.denoise, config.model.vae_scale_factor
    size, side = Size(config.height // factor, config.width // factor), denoise.tile_size // factor
    scale = dilation(size, side)
    step = config.model.patch
    small = Size(*(-(-side // (scale * step)) * step for side in size))
    if not denoise.dilated.enabled or scale == 1:
        return 1, size, []
    views = region_views(
        scaled(regions, Size(small.height * factor, small.width * factor)),
        small,
        side=Size(side, side),
        overlap=denoise.overlap // factor,
        blend=denoise.blend,
        guidance_scale=denoise.guidance_scale,
        step=step,
    )
    return scale, small, laid_out(views, scale, small)


def laid_out(views: list[View], scale: int, small: Size) -> list[View]:
    """The views of one sub-canvas, moved to the place of each of the ``scale^2`` that ``spread_out`` puts together."""
    found = []
    for place in range(scale * scale):
        down, across = place // scale * small.height, place % scale * small.width
        picture = Tile(0, 0, down, across, down + small.height, across + small.width)
        for view in views:
            row, col, top, left, bottom, right = view.tile
            tile = Tile(row, col, top + down, left + across, bottom + down, right + across)
            found.append(view._replace(tile=tile, picture=picture))
    return found


def gaussian(scale: int, sigma: float) -> list[float]:
    """The blur's shares, at most ``2 scale - 1`` of them: a sub-canvas has one latent of ``scale``, and should speak
    for those between."""
    radius = min(scale - 1, math.ceil(_REACH * sigma))
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    return (kernel / kernel.sum()).tolist()


def blurred(latents: Rows, top: int, bottom: int, kernel: Sequence[float]) -> Tensor:
    """Rows of ``latents`` through ``kernel`` both ways, ``[1, C, bottom - top, W]``. The canvas' edge goes on."""
    radius, height = len(kernel) // 2, bottom - top
    first, last = max(0, top - radius), min(latents.height, bottom + radius)
    above, below = max(0, radius - top), max(0, bottom + radius - latents.height)
    wide = F.pad(latents.read(first, last), (0, 0, above, below), mode="replicate")
    found = torch.zeros((1, latents.channels, height, latents.width))
    for offset, share in enumerate(kernel):
        found.add_(wide.narrow(-2, offset, height), alpha=share)
    wide = F.pad(found, (radius, radius, 0, 0), mode="replicate")
    found = torch.zeros_like(found)
    for offset, share in enumerate(kernel):
        found.add_(wide.narrow(-1, offset, latents.width), alpha=share)
    return found


def spread_row(row: Tensor, scale: int, width: int) -> Tensor:
    """``row [1, C, 1, W]`` as a row of ``scale`` sub-canvases of ``width``, side by side: number j has the latents
    (j + l scale). Places beyond the canvas get its last column."""
    padded = F.pad(row, (0, scale * width - row.shape[-1], 0, 0), mode="replicate")
    return padded.unflatten(-1, (width, scale)).transpose(-1, -2).flatten(-2)


def gathered_row(row: Tensor, scale: int, width: int, length: int) -> Tensor:
    """The reverse of ``spread_row``: ``length`` latents of the canvas."""
    return row.unflatten(-1, (scale, width)).transpose(-1, -2).flatten(-2)[..., :length]


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
        self._scale, self._small, self._channels = scale, small, channels
        self._powers, self._sigma = (cosine_scale, sigma_scale), sigma
        self._mixture = Mixture(views)

    @classmethod
    def of(cls, config: DictConfig, regions: Regions) -> Dilated | None:
        """As a config says; None where the term is off or the canvas too small for it."""
        scale, small, views = dilated_views(config, regions)
        d = config.denoise.dilated
        options = {"cosine_scale": d.cosine_scale, "sigma": d.sigma, "sigma_scale": d.sigma_scale}
        return cls(scale, small, views, config.model.latent_channels, **options) if views else None

    def asked(self, asks: Callable[[list[View]], list[View]]) -> Dilated:
        """This one, its views as ``asks`` changes them (a family's way of guidance)."""
        self._mixture = Mixture(asks(self._mixture.views))
        return self

    def mix(
        self,
        prediction: Rows,
        latents: Rows,
        denoise: Callable[[TileBatch], Tensor],
        timestep: float,
        num_train_timesteps: int,
        grouping: Grouping,
        ranks: Ranks = ALONE,
    ) -> None:
        """``(1 - c^a) prediction + c^a dilated``, in place; scratch files come to lie beside ``prediction``.

        The paper mixes what the scheduler makes of both predictions; the canvas being the same, mixing them before
        its one step is the same for steps that are linear in the prediction. The paper pads the canvas with zeros;
        here its edge goes on.

        Args:
            prediction: of the tiles, ``[1, C, H, W]`` float32; overwritten.
            latents: ``[1, C, H, W]`` float32, scaled by ``scheduler.scale_model_input``.
            denoise, grouping, ranks: see ``Mixture.predict``.
            timestep: of this step, of ``num_train_timesteps``.
        """
        weight, narrow = (skip_residual_weight(timestep, num_train_timesteps, power) for power in self._powers)
        if weight <= 0:
            return
        scale, small, folder = self._scale, self._small, prediction.path.parent
        shape = (self._channels, scale * small.height, scale * small.width)
        mosaic = Rows.create(folder / "dilated_latents.safetensors", shape)
        found = Rows.create(folder / "dilated_prediction.safetensors", shape)
        self._spread_out(latents, mosaic, gaussian(scale, self._sigma * (0.99 * narrow + 0.01)))
        self._mixture.predict(mosaic, found, denoise, grouping, ranks)
        if not ranks.first:
            return
        for top, rows in prediction.bands():
            for y in range(rows.shape[2]):
                place = self._place(top + y)
                own = gathered_row(found.read(place, place + 1), scale, small.width, prediction.width)
                rows[:, :, y : y + 1].lerp_(own, weight)
            prediction.write(top, rows)

    def _place(self, y: int) -> int:
        """Where the sub-canvases side by side have row ``y`` of the canvas."""
        return y % self._scale * self._small.height + y // self._scale

    def _spread_out(self, latents: Rows, mosaic: Rows, kernel: Sequence[float]) -> None:
        """The blurred canvas' sub-canvases side by side: number (i, j) has its latents (i + k scale, j + l scale).

        The blurred canvas gets the mean and the deviation back that it had. Places beyond it get its last row.
        """
        before, after = Moments(latents.channels), Moments(latents.channels)
        cuts = bands(latents.height, latents.width, channels=latents.channels)
        for top, bottom in cuts:
            before.add(latents.read(top, bottom))
            after.add(blurred(latents, top, bottom, kernel))
        (std, mean), (own_std, own_mean) = before.std_mean(together=True), after.std_mean(together=True)
        row = torch.empty(0)
        for top, bottom in cuts:
            soft = blurred(latents, top, bottom, kernel)
            soft.sub_(own_mean).mul_(std / own_std.clamp_min(1e-6)).add_(mean)
            for y in range(top, bottom):
                row = spread_row(soft[:, :, y - top : y - top + 1], self._scale, self._small.width)
                mosaic.write(self._place(y), row)
        for y in range(latents.height, self._scale * self._small.height):
            mosaic.write(self._place(y), row)
