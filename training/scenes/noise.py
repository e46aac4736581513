"""Band-limited gradient noise, looked up in a precomputed periodic texture (one grid_sample an octave).

Noise after K. Perlin, "Improving noise" (SIGGRAPH 2002). The texture holds the value and both derivatives.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

CELLS = 64  # lattice cells a side: the period
TEXELS = 16  # texels a cell


@lru_cache(maxsize=4)
def texture(device: str) -> torch.Tensor:
    """``[1,3,N+1,N+1]``: noise of about unit range, d/dx and d/dy per cell; last row and column repeat the first."""
    generator = torch.Generator().manual_seed(20240607)
    angle = torch.rand(CELLS, CELLS, generator=generator) * 2 * math.pi
    gx, gy = angle.cos(), angle.sin()
    n = CELLS * TEXELS
    position = torch.arange(n) / TEXELS
    cell, t = position.long(), position - position.floor()
    fade = t**3 * (t * (t * 6 - 15) + 10)
    total = torch.zeros(n, n)
    for dy in (0, 1):
        for dx in (0, 1):
            iy, ix = (cell + dy) % CELLS, (cell + dx) % CELLS
            g = gx[iy][:, ix] * (t - dx)[None, :] + gy[iy][:, ix] * (t - dy)[:, None]
            wy = fade if dy else 1 - fade
            wx = fade if dx else 1 - fade
            total += wy[:, None] * wx[None, :] * g
    total = total * 1.5
    ddx = (total.roll(-1, 1) - total.roll(1, 1)) * (TEXELS / 2)
    ddy = (total.roll(-1, 0) - total.roll(1, 0)) * (TEXELS / 2)
    stacked = torch.stack([total, ddx, ddy])[None]
    return F.pad(stacked, (0, 1, 0, 1), mode="circular").to(device)


def noise(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Noise at lattice coordinates (one cell a unit) ``[B,H,W]`` after broadcasting. Returns ``[B,3,H,W]``: value in
    about [-1, 1], d/dx, d/dy."""
    gx = x.remainder(CELLS) * (2 / CELLS) - 1
    gy = y.remainder(CELLS) * (2 / CELLS) - 1
    gx, gy = torch.broadcast_tensors(gx, gy)
    grid = torch.stack([gx, gy], -1)
    tex = texture(str(grid.device)).expand(grid.shape[0], -1, -1, -1)
    return F.grid_sample(tex, grid, mode="bilinear", padding_mode="border", align_corners=True)


def fade(wavelength: float, px: torch.Tensor) -> torch.Tensor:
    """1 where a wavelength (world units) spans four pixels of footprint ``px`` or more, 0 below 1.8, linear between."""
    return ((wavelength / px - 1.8) / 2.2).clamp(0, 1)


def fbm(
    x: torch.Tensor,
    y: torch.Tensor,
    px: torch.Tensor,
    finest: float,
    *,
    octaves: int,
    gain: float = 0.5,
    ridged: bool = False,
    seed: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Sum of octaves whose wavelengths a pixel can carry.

    x, y: lattice coordinates at the first octave. px: pixel footprint in the same units (``[B,1,1]`` or ``[B,H,1]``).
    finest: the least footprint in the batch, a float: octaves below it are not evaluated at all.
    ridged: octaves are ``1-2|n|`` (creases) instead of ``n``. Returns ``[B,3,H,W]`` (value, d/dx, d/dy).
    """
    total = None
    amplitude, frequency = 1.0, 1.0
    for octave in range(octaves):
        wavelength = 1.0 / frequency
        if octave and wavelength < 1.8 * finest:
            break
        shift = seed + octave * 11.37
        n = noise(x * frequency + shift, y * frequency + shift * 1.7)
        if ridged:
            value = n[:, :1]
            sign = -2.0 * value.sign()
            n = torch.cat([1 - 2 * value.abs(), n[:, 1:] * sign], 1)
        scale = fade(wavelength, px) * amplitude if octave else torch.full_like(px, amplitude)
        n = n * scale[:, None]
        if frequency != 1.0:
            n = torch.cat([n[:, :1], n[:, 1:] * frequency], 1)
        total = n if total is None else total + n
        amplitude *= gain
        frequency *= 2.0
    assert total is not None
    return total


def profile(
    x: torch.Tensor,
    px: torch.Tensor,
    finest: float,
    seed: torch.Tensor,
    *,
    octaves: int,
    gain: float = 0.5,
    ridged: bool = False,
) -> torch.Tensor:
    """One-dimensional noise along ``x`` (lattice coordinates, any shape ``[B,*,*]``): the value alone, same shape."""
    row = (seed * 13.1).expand(x.shape[0], 1, 1)
    return fbm(x, row, px, finest, octaves=octaves, gain=gain, ridged=ridged, seed=seed)[:, 0]
