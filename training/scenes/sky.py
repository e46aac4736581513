"""Sky: gradient, sun, moon with craters, stars with glints, clouds with filaments."""

import torch

from .canvas import Canvas, smooth
from .noise import fade, noise
from .scene import Scene


def paint_sky(c: Canvas, s: Scene) -> None:
    """Everything behind the land."""
    p = s.palette
    t = ((c.y - s.horizon) / (1.0 - s.horizon)).clamp(0, 1)[:, None]
    low = torch.lerp(p.horizon, p.middle, smooth(0.0, 0.45, t))
    sky = torch.lerp(low, p.zenith, smooth(0.25, 1.05, t))
    c.rgb = sky.expand(-1, -1, -1, c.size).contiguous()
    if s.spec.time == "night" and s.spec.weather in ("clear", "cloudy"):
        _stars(c, s)
    if s.spec.body == "sun" or s.spec.time in ("sunset", "sunrise"):
        _sun(c, s)
    elif s.spec.body in ("moon", "crescent"):
        _moon(c, s)
    _clouds(c, s)


def _stars(c: Canvas, s: Scene) -> None:
    for layer, (cells, size) in enumerate(((26.0, 0.0019), (60.0, 0.0010))):
        gx, gy = c.x * cells + s.u(f"star{layer}.x", 0, 40), c.y * cells + s.u(f"star{layer}.y", 0, 40)
        ix, iy = gx.floor(), gy.floor()
        rnd = noise(ix * 7.31 + 0.37, iy * 5.77 + 0.71)
        dx = (gx - ix - 0.5 - 0.25 * rnd[:, 1].clamp(-1, 1)) / cells
        dy = (gy - iy - 0.5 - 0.25 * rnd[:, 2].clamp(-1, 1)) / cells
        bright = (rnd[:, 0].abs() * 2.2 - 0.75).clamp(0, 1)
        radius = torch.maximum(size * (0.5 + bright), 0.45 * c.px)
        r = (dx * dx + dy * dy).sqrt()
        core = smooth(1.25, 0.35, r / radius)
        glint = (1 - r / (radius * 4.5)).clamp(0, 1) ** 2 * torch.exp(
            -torch.minimum(dx.abs(), dy.abs()) / (0.22 * radius)
        )
        energy = (size * (0.5 + bright) / radius) ** 0.7
        light = (core + 0.7 * glint) * bright * energy * smooth(s.horizon, s.horizon + 0.25, c.y)
        warm = torch.stack([1.0 + 0.1 * rnd[:, 1], torch.full_like(bright, 0.97), 1.0 - 0.1 * rnd[:, 1]], 1).clamp(0, 1)
        c.add(light, warm)


def _sun(c: Canvas, s: Scene) -> None:
    p = s.palette
    dx, dy = c.x - s.sun_x, c.y - s.sun_y
    r = (dx * dx + dy * dy).sqrt()
    overcast = 0.35 if s.spec.weather in ("storm", "rain", "snowfall", "fog") else 1.0
    wide = torch.exp(-((dx * 1.1) ** 2 + (dy * 1.9) ** 2) / 0.09)
    c.add(wide * 0.45 * overcast, p.sun)
    c.add(torch.exp(-r / 0.075) * 0.55 * overcast, p.sun)
    if s.spec.body == "sun":
        s.disc = s.u("sun.r", 0.042, 0.07) if s.spec.time != "day" else s.u("sun.r", 0.034, 0.05)
        disc = c.edge(r - s.disc, 0.002)
        core = torch.lerp(p.sun, torch.ones_like(p.sun), 0.55)
        c.paint(disc * (0.6 + 0.4 * overcast), core, "sun")


def _moon(c: Canvas, s: Scene) -> None:
    p = s.palette
    s.disc = radius = s.u("moon.r", 0.055, 0.085)
    dx, dy = (c.x - s.sun_x) / radius, (c.y - s.sun_y) / radius
    r = (dx * dx + dy * dy).sqrt()
    veil = 0.5 if s.spec.weather in ("storm", "rain", "fog", "snowfall") else 1.0
    c.add(torch.exp(-r / 2.2) * 0.34 * veil, p.sun)
    ball = (1 - r * r).clamp(min=0).sqrt()
    seas = c.texture(16.0, 16.0, s.u("moon.seas", 0, 60), octaves=7, gain=0.55)
    pits = c.texture(75.0, 75.0, s.u("moon.pits", 0, 60), octaves=4, ridged=True, gain=0.5)
    relief = (seas[:, 1] * 0.16 + pits[:, 1] * 0.045) * fade(0.02, c.px)
    tone = 0.93 - 0.17 * smooth(-0.1, 0.5, seas[:, 0]) + 0.22 * relief
    disc = c.edge((r - 1) * radius)
    if s.spec.body == "crescent":
        tilt = s.u("moon.tilt", -0.5, 0.5)
        shift = 0.55 * s.side
        bite = ((dx - shift) ** 2 + (dy - 0.4 * tilt) ** 2).sqrt()
        disc = disc * c.edge((0.98 - bite) * radius, 0.001)
    base = torch.lerp(p.sun, torch.ones_like(p.sun), 0.3)
    c.paint(disc * (0.55 + 0.45 * veil), base * (tone * (0.85 + 0.15 * ball))[:, None], "moon")


_AMOUNT = {"clear": (-0.62, -0.18), "cloudy": (0.05, 0.30), "storm": (0.35, 0.6), "fog": (-0.5, 0.0)}


def _clouds(c: Canvas, s: Scene) -> None:
    p = s.palette
    low, high = _AMOUNT.get(s.spec.weather, (0.2, 0.5))
    amount = s.u("cloud.amount", low, high)
    rise = (c.y - s.horizon + 0.30).clamp(min=0.08)
    x = (c.x - 0.5) / (rise + 0.35) + s.u("cloud.x", 0, 50)
    y = 1.6 * rise.log() * s.u("cloud.flat", 1.0, 1.7)
    density = c.texture(1.9, 1.9, s.u("cloud.seed", 0, 60), octaves=9, gain=0.44, x=x, y=y)
    body = density[:, 0] + amount * 1.0
    edge = s.u("cloud.edge", 0.10, 0.38)
    cover = smooth(0.0, edge, body)
    side = s.side * 0.35
    below = 1.0 if s.spec.time in ("day", "night") else -0.55
    lit = 0.55 - 0.26 * (density[:, 2] * below + density[:, 1] * side) - 0.30 * smooth(0.1, 0.9, body) * below
    colour = torch.lerp(p.cloud_dark, p.cloud_lit, lit.clamp(0, 1)[:, None])
    near_sun = torch.exp(-(((c.x - s.sun_x) * 1.3) ** 2 + ((c.y - s.sun_y) * 1.6) ** 2) / 0.05) * 0.5
    if s.spec.time != "night":
        colour = torch.lerp(colour, p.sun.expand_as(colour), (near_sun * (1 - 0.5 * smooth(0, 0.6, body)))[:, None])
    air = smooth(s.horizon + 0.30, s.horizon - 0.02, c.y)
    colour = torch.lerp(colour, p.horizon.expand_as(colour), (air * 0.75)[:, None])
    dense = 0.93 if s.spec.weather in ("storm", "cloudy", "rain", "snowfall") else 0.80
    above = smooth(s.horizon - 0.01, s.horizon + 0.05, c.y)
    if s.disc is not None:  # sun and moon stay whole: a disc behind clouds is a lump to whoever learns from it
        away = ((c.x - s.sun_x) ** 2 + (c.y - s.sun_y) ** 2).sqrt()
        above = above * smooth(s.disc * 1.05, s.disc * 1.8, away)
    c.paint(cover * dense * above, colour, "clouds")
