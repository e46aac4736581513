"""Water in perspective: waves, reflections of the sky and of what stands behind, glitter, foam, the beach."""

import torch

from .canvas import Canvas, smooth
from .land import Profile
from .noise import fbm, profile
from .scene import Scene


def paint_water(c: Canvas, s: Scene, mirror: list[tuple[Profile, torch.Tensor]]) -> None:
    """The water below the horizon. mirror: skylines to reflect with the colours ``[B,3,1,1]`` of their reflections."""
    p = s.palette
    depth = (s.horizon - c.y).clamp(min=0)
    near = depth + 0.012
    rough = {"storm": 1.0, "rain": 0.55, "clear": 0.26, "cloudy": 0.34, "fog": 0.2, "snowfall": 0.3}[s.spec.weather]
    rough = rough * (0.55 if s.spec.setting == "lake" else 1.0) * s.u("wave.rough", 0.8, 1.2)
    # logarithmic rows: a wave is as thick as its distance to the horizon, in every octave
    x = (c.x - 0.5) / near.sqrt() * 2.2 + s.u("wave.x", 0, 50)
    y = near.log() * 7.0
    px = c.px * 7.0 / near
    finest = c.finest * 7.0 / 0.8
    waves = fbm(x, y, px, finest, octaves=8, gain=0.55, seed=s.u("wave.seed", 0, 60))
    tilt = waves[:, 2] * rough * 0.55
    height = waves[:, 0] * rough
    # what the surface mirrors: the sky a little above the horizon, higher up where it tilts to us
    t = (depth * 1.7 + 0.10 * tilt).clamp(0, 1)[:, None]
    sky = torch.lerp(p.horizon, p.middle, smooth(0.0, 0.4, t))
    sky = torch.lerp(sky, p.zenith, smooth(0.25, 0.95, t))
    fresnel = (0.78 - 1.25 * depth - 0.34 * tilt).clamp(0.10, 0.95)
    body = p.deep * (1 + 0.30 * height)[:, None]
    colour = torch.lerp(body, sky, fresnel[:, None])
    for line, tint in mirror:
        shift = c.x + 0.010 * tilt * (0.3 + 3.0 * depth)
        image = line(shift) - s.horizon
        cover = smooth(0.012, -0.012, depth * 1.15 - image + 0.012 * tilt) * 0.72 * (1 - 0.45 * rough)
        colour = torch.lerp(colour, torch.lerp(p.deep, tint, 0.85).expand_as(colour), cover[:, None])
    colour = p.far(colour, (0.55 * smooth(0.16, 0.0, depth)).expand(-1, -1, c.size))
    c.paint(c.edge(c.y - s.horizon), colour, "water")
    _glitter(c, s, depth, waves, tilt)
    if s.spec.weather == "storm":
        caps = smooth(0.52, 0.85, waves[:, 0] + 0.25 * waves[:, 2].clamp(-1, 1)) * smooth(0.01, 0.09, depth)
        lace = c.texture(55.0, 110.0, s.u("foam.lace", 0, 60), octaves=4, ridged=True)[:, 0]
        foam = caps * (0.55 + 0.35 * lace).clamp(0, 1)
        c.paint(foam * 0.75, p.shade(s.rgb(0.93, 0.96, 0.97), torch.full_like(foam, 0.75)))


def _glitter(c: Canvas, s: Scene, depth: torch.Tensor, waves: torch.Tensor, tilt: torch.Tensor) -> None:
    """The path of sun or moon on the water."""
    if s.spec.body == "none" and s.spec.time not in ("sunset", "sunrise"):
        return
    p = s.palette
    veil = 0.3 if s.spec.weather in ("storm", "rain", "fog", "snowfall") else 1.0
    veil *= {"day": 0.35, "night": 0.75, "dusk": 0.5}.get(s.spec.time, 0.85) * (1.0 if s.spec.body != "none" else 0.5)
    width = 0.022 + 0.22 * depth
    off = (c.x - s.sun_x + 0.02 * tilt) / width
    path = torch.exp(-off * off)
    spark = smooth(0.05, 0.75, waves[:, 2] * 0.45 + waves[:, 0] * 0.35 + 0.30 - 0.8 * depth)
    sheet = path * (0.22 + 0.78 * spark) * veil
    c.add(sheet * c.edge(c.y - s.horizon), p.sun)
    wide = torch.exp(-((off / 3.2) ** 2)) * smooth(0.62, 0.95, waves[:, 2] * 0.5 + waves[:, 0] * 0.3) * 0.5 * veil
    c.add(wide * c.edge(c.y - s.horizon), p.sun)


def paint_beach(c: Canvas, s: Scene) -> Profile:
    """Sand in front, a wet band and a line of foam. Returns the height of the waterline."""
    p = s.palette
    lean = s.u("beach.lean", -0.22, 0.22)
    level = s.u("beach.level", 0.16, 0.25)
    seed = s.u("beach.seed", 0, 60)

    def line(x: torch.Tensor) -> torch.Tensor:
        n = profile(x * 3.0, c.px * 3.0, c.finest * 3.0, seed, octaves=6, gain=0.42)
        return level + lean * (x - 0.5) + 0.016 * n

    below = line(c.x) - c.y
    lace = c.texture(22.0, 60.0, s.u("beach.lace", 0, 60), octaves=6, gain=0.6)[:, 0]
    hue = s.u("sand.hue", 0, 1)[:, None]
    sand = torch.lerp(s.rgb(0.93, 0.82, 0.62), s.rgb(0.90, 0.74, 0.54), hue)
    grains = c.texture(480.0, 480.0, s.u("beach.grains", 0, 60), octaves=3, gain=0.7)[:, 0]
    broad = c.texture(6.0, 22.0, s.u("beach.broad", 0, 60), octaves=5, gain=0.5)
    lit = (0.80 + 0.07 * broad[:, 2] - 0.35 * below.clamp(0, 0.4)).clamp(0, 1)
    dry = p.shade(sand * (1 + 0.05 * grains + 0.04 * broad[:, 0])[:, None], lit)
    wet = torch.lerp(dry * 0.66, p.middle.expand_as(dry), 0.28)
    colour = torch.lerp(wet, dry, smooth(0.012, 0.045, below + 0.004 * lace)[:, None])
    c.paint(c.edge(-below), colour, "sand")
    foam = smooth(0.011, 0.0, (below + 0.006 + 0.006 * lace).abs()) * (0.75 + 0.4 * lace).clamp(0, 1)
    second = smooth(0.006, 0.0, (below + 0.040 + 0.010 * lace).abs()) * (0.4 + 0.6 * lace).clamp(0, 1)
    white = p.shade(s.rgb(0.98, 0.99, 1.0), torch.full_like(foam, 0.85))
    c.paint(torch.maximum(foam * 0.92, second * 0.7), white)
    return line
