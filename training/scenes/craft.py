"""What floats, flies or is pitched: sailing boat, ship, balloon, tent, birds, and the stone bridge."""

import torch

from .canvas import Canvas, box, bricks, smooth, stripes
from .scene import Scene


def _wake(
    c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, half: torch.Tensor, tall: torch.Tensor, tint: torch.Tensor
) -> None:
    """A broken reflection under a hull that floats at (x, y), and a line of foam."""
    p = s.palette
    depth = (y - c.y) / tall
    ripple = c.texture(8.0, 95.0, s.u("wake.seed", 0, 60), octaves=4)[:, 0]
    width = half * (1 - 0.55 * depth) * (1 + 0.25 * ripple)
    body = smooth(1.1, 0.75, (c.x - x).abs() / width) * smooth(1.0, 0.1, depth + 0.35 * ripple) * (depth > 0)
    c.paint(body * 0.62, torch.lerp(p.deep, tint, 0.6))
    foam = smooth(0.10, 0.02, (depth - 0.02 + 0.04 * ripple).abs()) * smooth(1.25, 0.85, (c.x - x).abs() / half)
    c.paint(foam * 0.55, p.shade(s.rgb(0.95, 0.97, 0.98), torch.full_like(foam, 0.8)))


def paint_sailboat(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A sloop with main and jib; ``size`` is the height of its mast."""
    p = s.palette
    way = torch.where(s.u("boat.way", 0, 1) > 0.5, 1.0, -1.0)
    heel = s.u("boat.heel", -0.06, 0.06) * (2.0 if s.spec.weather == "storm" else 1.0)
    lx = (c.x - x) - heel * (c.y - y)
    hx, hy = lx * way / size, (c.y - y + heel * (c.x - x)) / size
    white = torch.lerp(s.rgb(0.97, 0.95, 0.90), s.paint, (s.u("boat.dyed", 0, 1) > 0.35).float()[:, None] * 0.88)
    _wake(c, s, x, y, 0.36 * size, 0.55 * size, torch.lerp(p.horizon, white, 0.5))
    seam = stripes(hy * 9.0, 0.05, c.px / size * 9.0)
    c.paint(
        c.edge((hx.abs() - 0.008) * size) * (hy > 0.05) * (hy < 1.0),
        p.shade(s.rgb(0.35, 0.25, 0.18), torch.full_like(hx, 0.6)),
        "sailboat",
    )
    for low, high, reach, sign, bright in ((0.17, 0.97, 0.40, -1.0, 0.78), (0.15, 0.84, 0.30, 1.0, 0.95)):
        t = ((hy - low) / (high - low)).clamp(-0.2, 1.2)
        edge = reach * (1 - t) * (1 + 0.34 * t.clamp(0, 1))
        ex = hx * sign
        d = torch.maximum(torch.maximum(ex - edge, 0.016 - ex), torch.maximum(low - hy, hy - high))
        curve = (
            bright - 0.28 * (ex / edge.clamp(min=0.02)).clamp(0, 1) * torch.where(way * s.side * sign > 0, -1.0, 1.0)
        ).clamp(0, 1)
        c.paint(c.edge(d * size), p.shade(white * (1 - 0.10 * seam)[:, None], curve), "sailboat")
    t = (hy - 0.045) / 0.085
    belly = torch.maximum(
        hx.abs() - (0.34 + 0.06 * hx.sign() * t) * (1 - 0.40 * (0.5 - t).clamp(0, 1)), (t.abs() - 1) * 0.085
    )
    planks = stripes(hy * 55.0, 0.12, c.px / size * 55.0)
    hull = torch.lerp(s.rgb(0.50, 0.30, 0.19), s.rgb(0.92, 0.90, 0.86), (s.u("boat.hull", 0, 1) > 0.6).float()[:, None])
    stripe = smooth(0.02, 0.0, (t - 0.72).abs() - 0.1)
    hull = torch.lerp(hull, s.paint, (stripe * 0.85)[:, None])
    c.paint(
        c.edge(belly * size),
        p.shade(hull * (1 - 0.25 * planks)[:, None], (0.5 + 0.8 * hx * way * s.side + 0.2 * t).clamp(0, 1)),
        "sailboat",
    )
    if s.lamps > 0.5:
        r2 = (hx**2 + (hy - 0.16) ** 2) / 0.004
        c.add(torch.exp(-r2) * s.lamps * 0.8, s.rgb(1.0, 0.8, 0.45))


def paint_ship(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A steamer with a painted hull, decks of cabins, portholes, funnel and smoke; ``size`` is half its length."""
    p = s.palette
    way = torch.where(s.u("ship.way", 0, 1) > 0.5, 1.0, -1.0)
    hx, hy = (c.x - x) * way / size, (c.y - y) / size
    dark = torch.lerp(s.paint * 0.72, s.rgb(0.14, 0.16, 0.20), 0.25)
    _wake(c, s, x, y, size, 0.5 * size, dark)
    ft = (hy - 0.66) / 0.6
    smoke = c.texture(14.0, 20.0, s.u("ship.smoke", 0, 60), octaves=5)[:, 0]
    drift = -0.12 - 1.1 * ft.clamp(min=0) ** 1.4
    puff = (
        smooth(1.0, 0.2, (hx - drift).abs() / (0.07 + 0.32 * ft.clamp(min=0)) - 0.35 * smoke)
        * smooth(1.15, 0.1, ft)
        * (ft > 0)
    )
    c.paint(puff * 0.55, torch.lerp(p.cloud_dark, p.cloud_lit, 0.3))
    side = (0.52 + 0.25 * hx * way * s.side).clamp(0, 1)
    white = s.rgb(0.95, 0.94, 0.91)
    funnel = box(hx + 0.10, hy - 0.52, 0.075, 0.17)
    band = smooth(0.01, 0.0, (hy - 0.58).abs() - 0.045)
    c.paint(
        c.edge(funnel * size),
        p.shade(torch.lerp(s.paint, white, band[:, None]), (0.5 + 5 * (hx + 0.10) * way * s.side).clamp(0, 1)),
        "ship",
    )
    for left, right, low, high in ((-0.62, 0.38, 0.22, 0.31), (-0.48, 0.30, 0.31, 0.40), (0.08, 0.28, 0.40, 0.49)):
        deck = box(hx - (left + right) / 2, hy - (low + high) / 2, (right - left) / 2, (high - low) / 2)
        c.paint(c.edge(deck * size), p.shade(white, side), "ship")
        panes = stripes(hx * 17.0, 0.55, c.px / size * 17.0) * c.edge(((hy - (low + high) / 2).abs() - 0.022) * size)
        glass = torch.lerp(p.deep, s.rgb(1.0, 0.82, 0.45), s.lamps)
        c.paint(c.edge((deck + 0.02) * size) * panes * 0.9, glass, "ship")
        c.paint(
            c.edge(box(hx - (left + right) / 2, hy - high, (right - left) / 2 + 0.02, 0.008) * size),
            p.shade(s.rgb(0.45, 0.40, 0.38), side),
            "ship",
        )
    for mx in (0.62, -0.80):
        c.paint(c.edge(box(hx - mx, hy - 0.42, 0.010, 0.24) * size), p.shade(s.rgb(0.36, 0.28, 0.22), side), "ship")
    t = (hy - 0.10) / 0.13
    hull = torch.maximum(
        torch.maximum(hx - 0.90 - 0.10 * t, -hx - 0.88 - 0.05 * t),
        torch.maximum(hy - 0.23 - 0.09 * smooth(0.45, 1.0, hx), -0.03 - hy),
    )
    plates = bricks(hx * 9.0, hy * 26.0, c.px / size * 9.0, c.px / size * 26.0, 0.08)
    boot = smooth(0.005, -0.005, hy - 0.035)
    colour = torch.lerp(dark, s.rgb(0.50, 0.14, 0.12), boot[:, None]) * (1 - 0.16 * plates)[:, None]
    c.paint(c.edge(hull * size), p.shade(colour, side), "ship")
    hole = ((((hx * 8.0).remainder(1.0) - 0.5) / 8.0) ** 2 + (hy - 0.145) ** 2).sqrt() - 0.017
    lamp = torch.lerp(p.deep * 0.6, s.rgb(1.0, 0.84, 0.5), s.lamps)
    c.paint(c.edge(hole * size) * ((hx - 0.02).abs() < 0.75), lamp, "ship")


def paint_balloon(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A hot-air balloon whose basket hangs at (x, y); gores in two colours."""
    p = s.palette
    dx, t = (c.x - x) / size, (c.y - y) / size
    top = (dx * dx + ((t - 0.68) * 1.0) ** 2).sqrt() - 0.32
    taper = torch.maximum(dx.abs() - (0.30 - 0.62 * (0.60 - t).clamp(0, 0.38)), torch.maximum(t - 0.62, 0.24 - t))
    envelope = torch.minimum(top, taper)
    half = torch.where(
        t > 0.62, (0.1024 - (t - 0.68) ** 2).clamp(min=1e-4).sqrt(), (0.30 - 0.62 * (0.60 - t).clamp(0, 0.38))
    )
    u = (dx / half).clamp(-0.98, 0.98)
    gore = u.asin() * 3.2
    px = c.px / size / half * 3.2
    band = stripes(gore + 0.5, 0.5, px)
    seam = stripes(gore * 2.0 + 0.5, 0.05, px * 2.0) + 0.6 * stripes(t * 26.0, 0.06, c.px / size * 26.0)
    second = torch.lerp(s.rgb(0.97, 0.93, 0.84), s.rgb(0.98, 0.80, 0.35), s.u("balloon.second", 0, 1)[:, None].round())
    colour = torch.lerp(s.paint, second, band[:, None]) * (1 - 0.12 * seam)[:, None]
    lit = (0.60 + 0.40 * u * s.side + 0.20 * (t - 0.6)).clamp(0, 1)
    if s.lamps > 0.4:
        lit = (lit + 0.55 * s.lamps * smooth(0.95, 0.25, t)).clamp(0, 1.6)
    c.paint(c.edge(envelope * size), p.shade(colour, lit), "balloon")
    for sign in (-1.0, 1.0):
        rope = (dx - sign * (0.045 + 0.10 * (t - 0.10).clamp(0, 0.2))).abs() - 0.0035
        c.paint(c.edge(rope * size) * (t > 0.09) * (t < 0.25), p.shade(s.rgb(0.30, 0.22, 0.16), lit), "balloon")
    weave = torch.maximum(stripes(dx * 60.0, 0.2, c.px / size * 60.0), stripes(t * 60.0, 0.2, c.px / size * 60.0))
    basket = box(dx, t - 0.045, 0.055 + 0.12 * (t - 0.045), 0.048)
    c.paint(
        c.edge(basket * size),
        p.shade(s.rgb(0.55, 0.37, 0.21) * (1 - 0.25 * weave)[:, None], (0.55 + 6 * dx * s.side).clamp(0, 1)),
        "balloon",
    )


def paint_tent(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A ridge tent with an open flap, warm inside after dark, and a small fire beside it."""
    p = s.palette
    dx, t = (c.x - x) / size, (c.y - y) / size
    sag = 0.05 * torch.sin(t.clamp(0, 1) * 3.14159)
    edge = 0.78 * (1 - t) - sag
    tent = torch.maximum(dx.abs() - edge, -t) * 0.75
    seams = stripes((dx / edge.clamp(min=0.05)) * 2.5, 0.05, c.px / size / edge.clamp(min=0.05) * 2.5)
    weave = c.texture(300.0, 300.0, s.u("tent.weave", 0, 60), octaves=2)[:, 0]
    lit = torch.where(dx * s.side > 0, 0.92, 0.42) - 0.12 * (1 - t)
    if s.lamps > 0.4:
        lit = lit + 0.7 * s.lamps * smooth(0.8, 0.0, (dx * dx + t * t).sqrt())
    c.paint(
        c.edge(tent * size), p.shade(s.paint * (1 - 0.16 * seams + 0.03 * weave)[:, None], lit.clamp(0, 1.7)), "tent"
    )
    flap = torch.maximum(dx.abs() - 0.26 * (0.78 - t) / 0.78, torch.maximum(-t, t - 0.78))
    inside = torch.lerp(
        p.shade(s.rgb(0.16, 0.12, 0.12), lit.clamp(0, 1)),
        s.rgb(1.0, 0.75, 0.36),
        (s.lamps * smooth(0.75, 0.0, t))[:, None],
    )
    c.paint(c.edge(flap * size), inside, "tent")
    pole = dx.abs() - 0.012
    c.paint(
        c.edge(pole * size) * (t > 0) * (t < 1.05),
        p.shade(s.rgb(0.42, 0.30, 0.20), torch.full_like(t + dx, 0.6)),
        "tent",
    )
    c.add(torch.exp(-(dx * dx + (t - 0.2) ** 2) / 0.9) * 0.35 * s.lamps, s.rgb(1.0, 0.72, 0.38))


def paint_birds(c: Canvas, s: Scene) -> None:
    """A loose flock over the horizon."""
    p = s.palette
    cx, cy = s.u("flock.x", 0.30, 0.70), s.u("flock.y", 0.66, 0.82)
    spread = s.u("flock.spread", 0.10, 0.20)
    ink = torch.lerp(p.ambient * 0.35, p.horizon, 0.06)
    for i in range(9):
        bx = cx + spread * s.u(f"bird.{i}.x", -1.5, 1.5)
        by = cy + spread * s.u(f"bird.{i}.y", -0.75, 0.75)
        w = s.u(f"bird.{i}.w", 0.020, 0.046)
        flap = s.u(f"bird.{i}.flap", 0.25, 0.8)
        dx, dy = (c.x - bx) / w, (c.y - by) / w
        a = dx.abs().clamp(max=1.3)
        arc = flap * (a * (1.25 - a)) * 1.1 - 0.1
        feather = 0.02 * torch.sin(dx * 40.0) * smooth(0.3, 0.05, c.px / w * 10)
        thick = 0.13 * (1 - a * 0.9).clamp(min=0) + 0.015
        wing = torch.maximum((dy - arc).abs() - thick - feather, a - 1.0)
        body = ((dx / 0.16) ** 2 + ((dy + 0.06) / 0.14) ** 2).sqrt() - 1
        c.paint(torch.maximum(c.edge(wing * w * 0.8), c.edge(body * w * 0.14)), ink, "birds")


def paint_bridge(c: Canvas, s: Scene, deck: torch.Tensor, water: torch.Tensor) -> None:
    """A stone bridge across the picture: its road at height ``deck``, arches down to ``water``."""
    p = s.palette
    rise = s.u("bridge.rise", 0.0, 0.035)
    road = deck + rise * (1 - ((c.x - 0.5) * 2) ** 2)
    count = s.u("bridge.count", 2.6, 4.6).floor()
    u = (c.x - 0.5) * count + 0.5 * count.remainder(2.0) + 0.5
    centre = (u - u.floor() - 0.5) / count
    half = 0.40 / count
    spring = water + 0.25 * (deck - water)
    arch_h = (deck - spring) * 0.80
    hole = ((centre / half) ** 2 + ((c.y - spring).clamp(min=0) / arch_h) ** 2).sqrt() - 1
    hole = torch.maximum(hole * half * 0.8, water - 0.02 - c.y)
    body = torch.maximum(torch.maximum(c.y - road, water - 0.012 - c.y), -hole)
    stone = torch.lerp(s.rgb(0.62, 0.58, 0.55), s.rgb(0.70, 0.58, 0.46), s.u("bridge.hue", 0, 1)[:, None])
    n = 62.0
    joint = bricks(c.x * n * 0.55, c.y * n, c.px * n * 0.55, c.px * n, 0.13)
    ring = smooth(0.004, 0.0, (hole - 0.008).abs() - 0.007) * (c.y > spring)
    stain = c.texture(10.0, 14.0, s.u("bridge.stain", 0, 60), octaves=6)[:, 0]
    lit = (0.55 + 0.10 * s.side * (c.x - 0.5) - 1.2 * (road - c.y - 0.03).clamp(0, 0.25) + 0.05 * stain).clamp(0, 1)
    depth = (water - c.y) / 0.14
    image = 2 * water - c.y
    ghost_hole = ((centre / half) ** 2 + ((image - spring).clamp(min=0) / arch_h) ** 2).sqrt() - 1
    ghost = c.edge(torch.maximum(image - road, -ghost_hole * half * 0.8), 0.006) * (depth > 0) * smooth(1.6, 0.3, depth)
    c.paint(ghost * 0.5, p.shade(stone * 0.7, torch.full_like(lit, 0.3)))
    c.paint(c.edge(body), p.shade(stone * (1 - 0.18 * joint + 0.10 * ring + 0.07 * stain)[:, None], lit), "bridge")
    cap = (c.y - road - 0.006).abs() - 0.006
    c.paint(c.edge(cap), p.shade(stone * 1.12, torch.full_like(lit, 0.85)), "bridge")
