"""Buildings: the lighthouse, the house, the castle, the windmill. Each stands at (x, y) and is ``size`` high."""

import torch

from .canvas import Canvas, box, bricks, smooth, stripes
from .scene import Scene


def _window(
    c: Canvas, s: Scene, dx: torch.Tensor, dy: torch.Tensor, w: torch.Tensor, h: torch.Tensor, material: str
) -> None:
    """A window with frame and cross, lit after dark; (dx, dy) from its middle, w and h half sizes."""
    p = s.palette
    c.paint(
        c.edge(box(dx, dy, w * 1.28, h * 1.2)),
        p.shade(s.rgb(0.92, 0.89, 0.82), torch.full_like(c.ids, 0.6, dtype=torch.float32)),
        material,
    )
    glass = torch.lerp(p.deep * 0.7 + p.middle * 0.25, s.rgb(1.0, 0.80, 0.42), s.lamps)
    glow = (1 - 0.25 * (dy / h)).clamp(0, 1.2)
    c.paint(c.edge(box(dx, dy, w, h)), glass * glow[:, None], material)
    bars = torch.minimum(dx.abs() - w * 0.09, (dy - 0.2 * h).abs() - w * 0.09)
    c.paint(
        c.edge(torch.maximum(bars, box(dx, dy, w, h))),
        p.shade(s.rgb(0.55, 0.48, 0.42), torch.full_like(glow, 0.4)),
        material,
    )


def _halo(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, reach: torch.Tensor, strength: float) -> None:
    """Lamp light in the air around (x, y)."""
    r2 = ((c.x - x) ** 2 + (c.y - y) ** 2) / (reach * reach)
    c.add(torch.exp(-r2) * strength * s.lamps, s.rgb(1.0, 0.82, 0.48))


def paint_lighthouse(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A tapered tower with painted bands, brickwork, gallery, lantern room, dome, and a beam after dark."""
    p = s.palette
    dx, t = (c.x - x) / 1.3, (c.y - y) / size  # stout enough for windows and bands to show in a few latents
    if s.lamps > 0.4:
        _beam(c, s, x, y + size * 0.845, size)
    # base plinth
    c.paint(
        c.edge(box(dx, c.y - y, 0.135 * size, 0.028 * size)),
        p.shade(s.rgb(0.50, 0.46, 0.44), (0.5 + 3 * dx * s.side / size).clamp(0, 1)),
        "lighthouse",
    )
    half = size * (0.098 - 0.045 * t.clamp(0, 0.8))
    u = (dx / half).clamp(-1, 1)
    lit = smooth(-0.9, 0.95, u * s.side) * 0.88 + 0.08
    count = s.u("light.bands", 2.0, 4.0).round()
    band = stripes(t / 0.76 * count + 0.5, 0.5, c.px / (size * 0.76 / count))
    plain = (s.u("light.plain", 0, 1) > 0.86).float()
    white = s.rgb(0.95, 0.93, 0.89)
    colour = torch.lerp(white, s.paint, (band * (1 - plain))[:, None])
    rows = 62.0
    angle = u.clamp(-0.995, 0.995).asin()
    joint = bricks(angle * 5.0, t * rows, c.px / half * 5.0, c.px / size * rows, 0.13)
    tone = 1 - 0.14 * joint + 0.05 * c.texture(30.0, 12.0, s.u("light.stain", 0, 60), octaves=5)[:, 0]
    tower = c.edge(torch.maximum(dx.abs() - half, (t - 0.38).abs() * size - 0.38 * size))
    c.paint(tower, p.shade(colour * tone[:, None], lit), "lighthouse")
    door_w = 0.030 * size
    arch = torch.where(
        t > 0.075, (dx * dx + ((t - 0.075) * size) ** 2).sqrt() - door_w, torch.maximum(dx.abs() - door_w, -t * size)
    )
    planks = stripes(dx / door_w * 2.0, 0.12, c.px / door_w * 2.0)
    c.paint(c.edge(arch), p.shade(s.rgb(0.34, 0.22, 0.16) * (1 - 0.4 * planks)[:, None], lit), "lighthouse")
    w = 0.012 * size
    for level in (0.28, 0.46, 0.64):
        _window(c, s, dx + 0.018 * size * (level - 0.46) * 4, (t - level) * size, w, w * 1.6, "lighthouse")
    # gallery: slab, rail; lantern room; dome
    dark = s.rgb(0.20, 0.19, 0.22)
    c.paint(c.edge(box(dx, (t - 0.765) * size, 0.085 * size, 0.013 * size)), p.shade(dark, lit), "lighthouse")
    room = box(dx, (t - 0.845) * size, 0.046 * size, 0.062 * size)
    glass = torch.lerp(torch.lerp(p.middle, white, 0.3), s.rgb(1.0, 0.90, 0.55), max(0.25, s.lamps))
    c.paint(c.edge(room), glass, "lighthouse")
    lamp = ((dx / (0.026 * size)) ** 2 + ((t - 0.842) / 0.038) ** 2).sqrt()
    c.paint(smooth(1.1, 0.7, lamp) * max(0.35, s.lamps), s.rgb(1.0, 0.97, 0.80), "lighthouse")
    bars = stripes(dx / (0.023 * size) + 0.5, 0.16, c.px / (0.023 * size))
    c.paint(c.edge(room) * bars * 0.9, p.shade(dark, lit * 0.6), "lighthouse")
    rail = box(dx, (t - 0.803) * size, 0.083 * size, 0.027 * size)
    posts = stripes(dx / (0.014 * size), 0.14, c.px / (0.014 * size))
    hand = c.edge(box(dx, (t - 0.828) * size, 0.085 * size, 0.0032 * size))
    c.paint(torch.maximum(c.edge(rail) * posts, hand), p.shade(dark, lit), "lighthouse")
    roof_t = (t - 0.905) / 0.085
    roof = dx.abs() - 0.064 * size * (1 - roof_t.clamp(0, 1) ** 1.6)
    dome = torch.maximum(roof, torch.maximum(-roof_t, roof_t - 1) * 0.085 * size)
    seams = stripes(dx / (0.064 * size) / (1.02 - roof_t.clamp(0, 0.95)) * 3.0, 0.08, c.px / (0.02 * size))
    c.paint(
        c.edge(dome),
        p.shade(torch.lerp(s.paint, dark, plain[:, None]) * (0.92 - 0.25 * seams)[:, None], lit),
        "lighthouse",
    )
    c.paint(c.edge(box(dx, (t - 1.0) * size, 0.004 * size, 0.03 * size)), p.shade(dark, lit), "lighthouse")
    _halo(c, s, x, y + 0.845 * size, 0.28 * size, 0.75)


def _beam(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    way = torch.where(s.u("light.way", 0, 1) > 0.5, 1.0, -1.0)
    slope = s.u("light.slope", -0.10, 0.16)
    for sign in (1.0, -1.0):
        along = (c.x - x) * way * sign
        across = (c.y - y - slope * along * sign).abs()
        width = 0.012 * size + 0.16 * along.clamp(min=0)
        light = smooth(1.0, 0.1, across / width) * (along > 0) * torch.exp(-along / 0.40)
        c.add(light * (0.50 if sign > 0 else 0.28) * s.lamps, s.rgb(1.0, 0.90, 0.62))


def paint_house(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A cottage: plank or brick wall, tiled roof, chimney, door, two windows and one in the gable."""
    p = s.palette
    dx, dy = c.x - x, c.y - y
    w, wall, roof = 0.62 * size, 0.50 * size, 0.48 * size
    plank = s.u("house.plank", 0, 1) > 0.45
    snowy = s.spec.weather == "snowfall" or s.spec.setting in ("snowfield", "snowy mountains")
    # chimney behind the roof
    cx = dx - 0.34 * size * s.side
    count = 26.0 / size
    joint = bricks(cx * count * 0.6, c.y * count, c.px * count * 0.6, c.px * count)
    c.paint(
        c.edge(box(cx, dy - 0.82 * size, 0.065 * size, 0.17 * size)),
        p.shade(s.rgb(0.56, 0.33, 0.27) * (1 - 0.22 * joint)[:, None], (0.5 + 4 * cx * s.side / size).clamp(0, 1)),
        "house",
    )
    lines = stripes(dy * 18.0 / size, 0.10, c.px * 18.0 / size)
    stones = bricks(dx * 12.0 / size, dy * 20.0 / size, c.px * 12.0 / size, c.px * 20.0 / size)
    seams = torch.where(plank, lines.expand_as(stones), stones)
    base = torch.where(
        plank[:, None],
        torch.lerp(s.rgb(0.62, 0.43, 0.28), s.rgb(0.93, 0.88, 0.78), s.u("house.wood", 0, 1)[:, None]),
        s.rgb(0.78, 0.66, 0.58),
    )
    grain = c.texture(24.0, 200.0, s.u("house.grain", 0, 60), octaves=3)[:, 0]
    lit = (0.62 + 0.28 * dx * s.side / w - 0.25 * smooth(wall * 0.8, wall, dy)).clamp(0, 1)
    c.paint(
        c.edge(box(dx, dy - wall / 2, w, wall / 2)),
        p.shade(base * (1 - 0.20 * seams + 0.05 * grain)[:, None], lit),
        "house",
    )
    # hipped roof: a trapezoid with rows of tiles
    rt = (dy - wall) / roof
    half = (w * 1.17) * (1 - rt) + w * 0.42 * rt
    slab = torch.maximum(dx.abs() - half, (dy - wall - roof / 2).abs() - roof / 2)
    v = rt * 11.0
    scallop = (dx * 15.0 / size + 0.5 * v.floor().remainder(2.0)).remainder(1.0) - 0.5
    row = (v + 0.9 * scallop * scallop).remainder(1.0)
    shade = (row - 0.5) * smooth(0.5, 0.12, c.px * 15.0 / size)
    colour = p.shade(
        s.paint * 0.88 * (1 + 0.36 * shade)[:, None], (0.52 + 0.30 * dx * s.side / w + 0.15 * rt).clamp(0, 1)
    )
    if snowy:
        drift = c.texture(30.0, 30.0, s.u("house.snow", 0, 60), octaves=4)[:, 0]
        load = smooth(0.30, 0.42, rt + 0.14 * drift)
        colour = torch.lerp(
            colour, p.shade(s.rgb(0.95, 0.97, 1.0), (0.75 + 0.2 * dx * s.side / w).clamp(0, 1)), load[:, None]
        )
    c.paint(c.edge(slab), colour, "house")
    c.paint(c.edge(box(dx, dy - wall, w * 1.17, 0.016 * size)), p.shade(s.rgb(0.36, 0.27, 0.22), lit), "house")
    door = box(dx, dy - 0.17 * size, 0.085 * size, 0.17 * size)
    planks = stripes(dx * 40.0 / size, 0.12, c.px * 40.0 / size)
    c.paint(c.edge(door), p.shade(s.rgb(0.38, 0.24, 0.17) * (1 - 0.35 * planks)[:, None], lit), "house")
    knob = ((dx - 0.055 * size) ** 2 + (dy - 0.16 * size) ** 2).sqrt() - 0.011 * size
    c.paint(c.edge(knob), p.shade(s.rgb(0.95, 0.78, 0.35), torch.full_like(lit, 0.9)), "house")
    for sign in (-1.0, 1.0):
        _window(c, s, dx - sign * 0.36 * size, dy - 0.27 * size, 0.088 * size, 0.098 * size, "house")
    _halo(c, s, x, y + 0.27 * size, 0.85 * size, 0.30)


def paint_castle(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A keep between two round towers with battlements, cone roofs and a flag."""
    p = s.palette
    stone = torch.lerp(s.rgb(0.66, 0.62, 0.58), s.rgb(0.74, 0.66, 0.54), s.u("castle.hue", 0, 1)[:, None])
    n = 46.0 / size
    stain = c.texture(18.0, 18.0, s.u("castle.stain", 0, 60), octaves=5)[:, 0]

    def wall(ex: torch.Tensor, low: float, high: float, half: float, round_: bool) -> None:
        w = half * size
        u = (ex / w).clamp(-0.995, 0.995)
        across = (u.asin() * w) if round_ else ex
        joint = bricks(across * n * 0.6, c.y * n, c.px * n * 0.6, c.px * n, 0.14)
        lit = (0.52 + (0.42 if round_ else 0.16) * u * s.side).clamp(0, 1)
        body = box(ex, c.y - y - (low + high) / 2 * size, w, (high - low) / 2 * size)
        teeth = stripes(ex / (0.055 * size), 0.55, c.px / (0.055 * size))
        crown = c.edge(box(ex, c.y - y - (high + 0.018) * size, w * 1.10, 0.018 * size))
        top = c.edge(box(ex, c.y - y - (high + 0.052) * size, w * 1.10, 0.022 * size)) * teeth
        colour = p.shade(stone * (1 - 0.17 * joint + 0.07 * stain)[:, None], lit)
        c.paint(torch.maximum(torch.maximum(c.edge(body), crown), top), colour, "castle")

    def cone(ex: torch.Tensor, low: float, high: float, half: float) -> None:
        t = ((c.y - y) / size - low) / (high - low)
        d = torch.maximum(ex.abs() - half * size * (1 - t), -t * (high - low) * size)
        tiles = stripes(t * 14.0, 0.16, c.px / ((high - low) * size) * 14.0)
        lit = (0.50 + 0.45 * ex * s.side / (half * size)).clamp(0, 1)
        c.paint(c.edge(d), p.shade(s.paint * (0.9 - 0.18 * tiles)[:, None], lit), "castle")

    dx = c.x - x
    wall(dx, -0.12, 0.62, 0.135, False)
    cone(dx, 0.68, 0.95, 0.15)
    wall(dx, -0.12, 0.36, 0.42, False)
    for sign in (-1.0, 1.0):
        ex = dx - sign * 0.40 * size
        wall(ex, -0.12, 0.55, 0.105, True)
        cone(ex, 0.61, 0.88, 0.125)
        _window(c, s, ex, c.y - y - 0.40 * size, 0.018 * size, 0.036 * size, "castle")
    _window(c, s, dx, c.y - y - 0.50 * size, 0.022 * size, 0.040 * size, "castle")
    for sign in (-1.0, 1.0):
        _window(c, s, dx - sign * 0.20 * size, c.y - y - 0.22 * size, 0.018 * size, 0.032 * size, "castle")
    gate = ((dx / (0.075 * size)) ** 2 + ((c.y - y - 0.06 * size).clamp(min=0) / (0.09 * size)) ** 2).sqrt() - 1
    planks = stripes(dx * 40.0 / size, 0.14, c.px * 40.0 / size)
    c.paint(
        c.edge(gate * 0.075 * size) * (c.y > y - 0.12 * size),
        p.shade(s.rgb(0.30, 0.20, 0.15) * (1 - 0.3 * planks)[:, None], torch.full_like(gate, 0.5)),
        "castle",
    )
    ft, fx = (c.y - y) / size - 0.95, dx / size
    pole = box(dx, c.y - y - 1.0 * size, 0.005 * size, 0.06 * size)
    c.paint(c.edge(pole), p.shade(s.rgb(0.3, 0.25, 0.22), torch.full_like(gate, 0.5)), "castle")
    wave = 0.012 * torch.sin(fx * 55.0)
    flag = torch.maximum(torch.maximum(-fx, fx - 0.13), (ft - 0.075 - wave).abs() - 0.032 * (1 - fx / 0.15)) * size
    c.paint(c.edge(flag), p.shade(s.paint, torch.full_like(gate, 0.9)), "castle")
    _halo(c, s, x, y + 0.3 * size, 0.6 * size, 0.20)


def paint_windmill(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A tapered mill with a cap and four latticed sails."""
    p = s.palette
    dx, t = c.x - x, (c.y - y) / size
    half = size * (0.150 - 0.085 * t)
    u = (dx / half).clamp(-0.99, 0.99)
    lit = (0.52 + 0.42 * u * s.side).clamp(0, 1)
    joint = bricks(u.asin() * 5.5, t * 36.0, c.px / half * 5.5, c.px / size * 36.0)
    wood = torch.lerp(s.rgb(0.86, 0.80, 0.70), s.rgb(0.62, 0.45, 0.34), s.u("mill.hue", 0, 1)[:, None])
    c.paint(
        c.edge(torch.maximum(dx.abs() - half, box(dx * 0, (t - 0.31) * size, 1.0, 0.35 * size))),
        p.shade(wood * (1 - 0.16 * joint)[:, None], lit),
        "windmill",
    )
    cap = ((dx / (0.125 * size)) ** 2 + ((t - 0.655) / 0.12).clamp(min=0) ** 2).sqrt() - 1
    tiles = stripes(t * 60.0, 0.16, c.px / size * 60.0)
    c.paint(c.edge(cap * 0.12 * size) * (t > 0.65), p.shade(s.paint * (0.92 - 0.18 * tiles)[:, None], lit), "windmill")
    c.paint(
        c.edge(box(dx, (t - 0.08) * size, 0.042 * size, 0.085 * size)),
        p.shade(s.rgb(0.36, 0.24, 0.18), lit),
        "windmill",
    )
    for level in (0.30, 0.48):
        _window(c, s, dx, (t - level) * size, 0.022 * size, 0.028 * size, "windmill")
    hx, hy = dx / size, t - 0.70
    turn = s.u("mill.turn", 0, 1.5708)
    arm = s.rgb(0.30, 0.22, 0.18)
    for k in range(4):
        a = turn + k * 1.570796
        along, across = hx * a.cos() + hy * a.sin(), -hx * a.sin() + hy * a.cos()
        sail = torch.maximum((along - 0.27).abs() - 0.18, (across - 0.048).abs() - 0.042) * size
        grid = torch.maximum(
            stripes(along * 26.0, 0.10, c.px / size * 26.0), stripes(across * 48.0, 0.10, c.px / size * 48.0)
        )
        cloth = p.shade(torch.lerp(s.rgb(0.93, 0.90, 0.82), arm, grid[:, None] * 0.8), torch.full_like(grid, 0.72))
        c.paint(c.edge(sail) * 0.94, cloth, "windmill")
        spar = torch.maximum((along - 0.23).abs() - 0.23, across.abs() - 0.0085) * size
        c.paint(c.edge(spar), p.shade(arm, torch.full_like(grid, 0.5)), "windmill")
    hub = ((hx * hx + hy * hy).sqrt() - 0.022) * size
    c.paint(c.edge(hub), p.shade(arm, torch.full_like(hub, 0.7)), "windmill")
