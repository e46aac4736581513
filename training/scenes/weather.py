"""What lies over the picture: fog, rain, falling snow, and the gentle darkening of the corners."""

import torch

from .canvas import Canvas, smooth
from .noise import noise
from .scene import Scene


def paint_weather(c: Canvas, s: Scene) -> None:
    """Overlay the scene's weather."""
    kind = s.spec.weather
    if kind == "fog":
        _fog(c, s)
    elif kind in ("rain", "storm"):
        _rain(c, s, 0.9 if kind == "rain" else 0.35)
    elif kind == "snowfall":
        _snow(c, s)
    r2 = (c.x - 0.5) ** 2 + (c.y - 0.5) ** 2
    c.rgb = (c.rgb * (1 - 0.16 * r2)[:, None]).clamp(0, 1)


def _fog(c: Canvas, s: Scene) -> None:
    banks = c.texture(1.6, 6.0, s.u("fog.seed", 0, 60), octaves=6, gain=0.5)[:, 0]
    band = torch.exp(-(((c.y - s.horizon) / 0.20) ** 2))
    cover = (0.16 + 0.55 * band + 0.20 * banks).clamp(0, 0.80)
    c.paint(cover, torch.lerp(s.palette.horizon, s.palette.cloud_lit, 0.35))


def _rain(c: Canvas, s: Scene, strength: float) -> None:
    slant = s.u("rain.slant", -0.28, 0.28)
    for layer, (columns, rows) in enumerate(((46.0, 7.0), (90.0, 13.0))):
        u = (c.x + slant * c.y) * columns
        column = u.floor()
        shift = noise(column * 5.3 + 0.41, torch.full_like(column, 3.7) + s.u(f"rain{layer}", 0, 60))
        v = c.y * rows + shift[:, 0] * 17.0
        cell = v.floor()
        rnd = noise(column * 3.1 + 0.27, cell * 2.3 + 0.63)[:, 0]
        inside = v - cell
        streak = smooth(0.0, 0.3, inside) * smooth(0.9, 0.5, inside) * (rnd > 0.05)
        width = torch.maximum(torch.full_like(c.px, 0.0011), 0.55 * c.px)
        line = c.edge((u - column - 0.5).abs() / columns - width * 0.5) * (0.0011 / width)
        c.add(line * streak * 0.42 * strength, torch.lerp(s.palette.horizon, s.palette.cloud_lit, 0.6))


def _snow(c: Canvas, s: Scene) -> None:
    for layer, (cells, size) in enumerate(((12.0, 0.0060), (22.0, 0.0040), (40.0, 0.0024))):
        u, v = c.x * cells + s.u(f"flake{layer}.x", 0, 40), c.y * cells + s.u(f"flake{layer}.y", 0, 40)
        ix, iy = u.floor(), v.floor()
        rnd = noise(ix * 7.31 + 0.37, iy * 5.77 + 0.71)
        dx = (u - ix - 0.5 - 0.28 * rnd[:, 1].clamp(-1, 1)) / cells
        dy = (v - iy - 0.5 - 0.28 * rnd[:, 2].clamp(-1, 1)) / cells
        r = (dx * dx + dy * dy).sqrt()
        angle = torch.atan2(dy, dx)
        radius = size * (1 + 0.35 * rnd[:, 0])
        star = radius * (0.80 + 0.20 * torch.cos(angle * 6.0) * smooth(0.3, 0.08, c.px / radius))
        flake = c.edge(r - star, size * 0.5) * (rnd[:, 0] > -0.35)
        c.paint(flake * 0.85, torch.lerp(s.palette.light.clamp(max=1), torch.ones_like(s.palette.light), 0.35))
