"""Land: mountains with facets and snow, hills and meadows, dunes, snowfields, the sea cliff."""

from collections.abc import Callable

import torch

from .canvas import Canvas, smooth, stripes
from .noise import fade, profile
from .scene import Scene

Profile = Callable[[torch.Tensor], torch.Tensor]  # world x to world height


def ridge_line(
    c: Canvas, s: Scene, name: str, base: torch.Tensor, height: torch.Tensor | float, frequency: float
) -> Profile:
    """A mountain skyline: creased noise, finer and finer."""
    seed = s.u(f"{name}.seed", 0, 60)

    def line(x: torch.Tensor) -> torch.Tensor:
        n = profile(x * frequency, c.px * frequency, c.finest * frequency, seed, octaves=9, gain=0.47, ridged=True)
        return base + height * (0.35 + 0.42 * n)

    return line


def hill_line(
    c: Canvas, s: Scene, name: str, base: torch.Tensor, height: torch.Tensor | float, frequency: float
) -> Profile:
    """A soft skyline of rolling ground."""
    seed = s.u(f"{name}.seed", 0, 60)

    def line(x: torch.Tensor) -> torch.Tensor:
        n = profile(x * frequency, c.px * frequency, c.finest * frequency, seed, octaves=3, gain=0.32)
        return base + height * n

    return line


def paint_mountains(
    c: Canvas,
    s: Scene,
    name: str,
    line: Profile,
    *,
    depth: float,
    snow: float | None,
    foot: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """A range under ``line`` down to ``foot``. depth: 0 near to 1 far. snow: share of its height in snow, or None."""
    p = s.palette
    top = line(c.x)
    below = top - c.y
    cover = c.edge(-below) * c.edge(foot - 0.03 - c.y)
    warp = c.texture(3.0, 3.0, s.u(f"{name}.warp", 0, 60), octaves=2)[:, 0] * 0.05
    spurs = c.texture(
        4.6 * scale,
        2.5 * scale,
        s.u(f"{name}.spur", 0, 60),
        octaves=9,
        gain=0.42,
        ridged=True,
        x=c.x + warp - 0.4 * s.side * below,
    )
    slope = spurs[:, 1] * s.side
    lit = smooth(-2.1, 2.1, slope + 0.35 * spurs[:, 2]) * 0.9 + 0.03
    grain = c.texture(40.0, 90.0, s.u(f"{name}.strata", 0, 60), octaves=4, gain=0.6)[:, 0]
    hue = s.u(f"{name}.hue", 0, 1)[:, None]
    rock = torch.lerp(s.rgb(0.50, 0.47, 0.47), s.rgb(0.55, 0.47, 0.40), hue)
    if s.spec.time == "day" and snow is None:
        rock = torch.lerp(rock, s.rgb(0.40, 0.48, 0.42), 0.35)
    colour = p.shade(rock * (1 + 0.07 * grain)[:, None], lit)
    if snow is not None:
        level = foot + (top.amax(-1, keepdim=True) - foot) * (1 - snow)
        rough = spurs[:, 0] * 0.035 - 0.018 * slope.clamp(-2, 2) + 0.012 * grain
        on = smooth(-0.012, 0.016, c.y - level + rough)
        blue = p.snow(0.18 + 0.82 * lit)
        sparkle = (c.texture(500.0, 500.0, s.u(f"{name}.sparkle", 0, 60), octaves=2)[:, 0] * fade(0.002, c.px)).clamp(
            0, 1
        )
        white = blue * (1 + 0.10 * sparkle * lit)[:, None]
        colour = torch.lerp(colour, white, on[:, None])
    else:
        on = torch.zeros_like(lit)
    mist = smooth(foot + 0.22, foot - 0.01, c.y) * (0.30 + 0.25 * depth)
    colour = p.far(colour, depth + mist)
    c.paint(cover, colour, "rock")
    if snow is not None:
        c.ids = torch.where((cover > 0.5) & (on > 0.5), 5, c.ids)


def grass_colour(s: Scene) -> torch.Tensor:
    """Base green of this scene ``[B,3,1,1]``, from fresh to straw."""
    t = s.u("grass.hue", 0, 1)[:, None]
    return torch.lerp(s.rgb(0.34, 0.56, 0.24), s.rgb(0.58, 0.60, 0.28), t * t)


def paint_hill(
    c: Canvas, s: Scene, name: str, line: Profile, *, depth: float, base: torch.Tensor, kind: str = "grass"
) -> None:
    """A layer of ground under ``line``: kind ``grass`` (blades, flowers) or ``snow`` (drifts, sparkle)."""
    p = s.palette
    top = line(c.x)
    below = top - c.y
    cover = c.edge(-below)
    step = 0.02
    tilt = (line(c.x - step * s.side) - line(c.x + step * s.side)) / (2 * step)
    broad = c.texture(3.5, 9.0, s.u(f"{name}.broad", 0, 60), octaves=3)[:, 0]
    if kind == "grass":
        tufts = c.texture(70.0, 26.0, s.u(f"{name}.tufts", 0, 60), octaves=3, gain=0.6)[:, 0]
        blades = c.texture(420.0, 60.0, s.u(f"{name}.blades", 0, 60), octaves=2, ridged=True, gain=0.6)[:, 0]
        blades = blades * fade(1 / 420.0, c.px)
        lit = (0.66 - 0.9 * tilt + 0.16 * broad - 1.1 * below.clamp(0, 0.35) * (1 - depth)).clamp(0.05, 1)
        colour = p.shade(base * (1 + 0.10 * tufts + 0.13 * blades + 0.10 * broad)[:, None], lit)
        if depth < 0.3:
            dots = c.texture(150.0, 95.0, s.u(f"{name}.flowers", 0, 60), octaves=1)[:, 0]
            patch = smooth(0.0, 0.35, c.texture(5.0, 11.0, s.u(f"{name}.patch", 0, 60), octaves=2)[:, 0])
            bloom = smooth(0.52, 0.62, dots) * patch * smooth(0.0, 0.02, below)
            colour = torch.lerp(colour, p.shade(s.rgb(0.98, 0.86, 0.55), lit), (0.8 * bloom)[:, None])
    else:
        drift = c.texture(9.0, 40.0, s.u(f"{name}.drift", 0, 60), octaves=6, gain=0.5)
        grains = c.texture(480.0, 480.0, s.u(f"{name}.grains", 0, 60), octaves=2)[:, 0] * fade(1 / 480.0, c.px)
        lit = (0.74 - 0.9 * tilt + 0.07 * drift[:, 1] * s.side + 0.12 * broad - 0.9 * below.clamp(0, 0.3)).clamp(
            0.08, 1
        )
        colour = p.snow(lit) * (1 + 0.05 * grains)[:, None]
    colour = p.far(colour, depth)
    c.paint(cover, colour, "grass" if kind == "grass" else "snow")


def paint_dune(c: Canvas, s: Scene, name: str, line: Profile, *, depth: float, size: float) -> None:
    """A dune under ``line``: a lit face, a shadow face that falls from the crest, wind ripples."""
    p = s.palette
    top = line(c.x)
    below = top - c.y
    cover = c.edge(-below)
    step = 0.012 * size
    skew = (
        c.x
        + s.side * below.clamp(min=0) * 0.9
        + 0.03 * c.texture(4.0, 8.0, s.u(f"{name}.bend", 0, 60), octaves=2)[:, 0]
    )
    tilt = (line(skew - step * s.side) - line(skew + step * s.side)) / (2 * step)
    face = smooth(0.10, -0.04, tilt)
    warp = c.texture(6.0, 10.0, s.u(f"{name}.warp", 0, 60), octaves=3)[:, 0]
    count = 34.0 / size
    phase = (below + 0.10 * c.x + 0.016 * warp) * count * 3.0
    ripples = stripes(phase, 0.5, c.px * count * 3.0) - 0.5
    grains = c.texture(520.0, 520.0, s.u(f"{name}.grains", 0, 60), octaves=2)[:, 0] * fade(1 / 520.0, c.px)
    hue = s.u("sand.hue", 0, 1)[:, None]
    sand = torch.lerp(s.rgb(0.95, 0.76, 0.50), s.rgb(0.93, 0.64, 0.40), hue)
    lit = (0.44 + 0.52 * face - 0.55 * below.clamp(0, 0.3) + 0.05 * warp + 0.10 * ripples * (0.4 + face)).clamp(0.03, 1)
    colour = p.shade(sand * (1 + 0.06 * grains + 0.04 * warp)[:, None], lit)
    c.paint(cover, p.far(colour, depth), "sand")


def cliff_line(c: Canvas, s: Scene) -> tuple[Profile, torch.Tensor, torch.Tensor]:
    """The sea cliff's skyline, the side it stands on (+1: right), and the x of its brink."""
    side = torch.where(s.u("cliff.side", 0, 1) > 0.5, 1.0, -1.0)
    reach = s.u("cliff.reach", 0.40, 0.62)
    brink = torch.where(side > 0, 1 - reach, reach)
    height = s.horizon + s.u("cliff.height", 0.02, 0.14)
    seed = s.u("cliff.seed", 0, 60)

    def line(x: torch.Tensor) -> torch.Tensor:
        rough = profile(x * 5.0, c.px * 5.0, c.finest * 5.0, seed, octaves=7, gain=0.5)
        inland = (x - brink) * side
        wall = smooth(-0.20, 0.03, inland + 0.035 * rough) ** 0.8
        return -0.2 + (height + 0.2 + 0.07 * smooth(0.0, 0.5, inland) + 0.018 * rough * wall) * wall

    return line, side, brink


def paint_cliff(c: Canvas, s: Scene, line: Profile, side: torch.Tensor) -> None:
    """Rock with strata, cracks and a grassy top; foam where it meets the sea."""
    p = s.palette
    top = line(c.x)
    below = top - c.y
    cover = c.edge(-below)
    warp = c.texture(5.0, 5.0, s.u("cliff.warp", 0, 60), octaves=3)[:, 0]
    facets = c.texture(8.0, 3.6, s.u("cliff.facets", 0, 60), octaves=8, gain=0.42, ridged=True, x=c.x + 0.05 * warp)
    strata = c.texture(
        3.0, 24.0, s.u("cliff.strata", 0, 60), octaves=5, gain=0.5, y=c.y + 0.02 * warp + 0.1 * side * c.x
    )[:, 0]
    cracks = c.texture(26.0, 17.0, s.u("cliff.cracks", 0, 60), octaves=3, ridged=True, gain=0.6)[:, 0]
    crack = smooth(1.05, 1.5, cracks) * fade(1 / 40.0, c.px)
    outward = torch.where(side * s.side < 0, 0.30, 0.0)
    lit = (
        smooth(-2.2, 2.2, facets[:, 1] * s.side + 0.6 * facets[:, 2]) * 0.75 + outward - 0.5 * below.clamp(0, 0.4)
    ).clamp(0, 1)
    hue = s.u("cliff.hue", 0, 1)[:, None]
    rock = torch.lerp(s.rgb(0.56, 0.50, 0.47), s.rgb(0.66, 0.52, 0.40), hue)
    colour = p.shade(rock * (1 + 0.13 * strata - 0.30 * crack)[:, None], lit)
    c.paint(cover, p.far(colour, 0.04), "cliff")
    fringe = c.texture(60.0, 10.0, s.u("cliff.fringe", 0, 60), octaves=4, gain=0.6)[:, 0]
    flat = smooth(s.horizon - 0.12, s.horizon - 0.02, top)
    turf = c.edge(below - (0.020 + 0.012 * fringe) * flat, 0.002) * cover * flat
    blades = c.texture(420.0, 70.0, s.u("cliff.blades", 0, 60), octaves=2, ridged=True)[:, 0] * fade(1 / 420.0, c.px)
    green = grass_colour(s) * (1 + 0.15 * blades + 0.12 * fringe)[:, None]
    c.paint(turf, p.shade(green, (0.80 - 14 * below.clamp(0, 0.03)).clamp(0, 1)), "grass")
