"""Plants: rows of pines, a broad-leaved tree, the saguaro cactus."""

import torch

from .canvas import Canvas, smooth
from .land import Profile
from .noise import fade, noise
from .scene import Scene


def paint_pines(
    c: Canvas,
    s: Scene,
    name: str,
    ground: Profile,
    *,
    width: float,
    height: float,
    depth: float,
    snow: bool,
    density: float = 1.0,
) -> None:
    """A row of pines, one a cell of ``width``; two interleaved cells so that crowns overlap. height: of a mean tree."""
    p = s.palette
    for half in (0.0, 0.5):
        shift = s.u(f"{name}.{half}.shift", 0, 40)
        u = c.x / width + shift + half
        cell = u.floor()
        rnd = noise(cell * 3.71 + 0.4, cell * 0.0 + s.u(f"{name}.{half}.row", 0, 60))
        jitter, size, skip = rnd[:, 1] * 0.16, rnd[:, 0], rnd[:, 2]
        middle = (cell + 0.5 + jitter.clamp(-0.2, 0.2) - shift - half) * width
        tall = height * (1.0 + 0.42 * size.clamp(-1, 1))
        base = ground(middle) - 0.012
        t = (c.y - base) / tall
        dx = (c.x - middle) / width
        tiers = 9.0
        saw = 1.0 - (t * tiers + 0.25 * skip).remainder(1.0)
        needle = c.texture(240.0, 150.0, s.u(f"{name}.needles", 0, 60), octaves=3, gain=0.6, ridged=True)[:, 0]
        needle = needle * fade(1 / 200.0, c.px)
        reach = (1 - t).clamp(min=0) ** 0.9 * 0.40 * (0.72 + 0.28 * saw) * (1 + 0.10 * needle)
        distance = (dx.abs() - reach) * width * 0.8
        cover = c.edge(distance) * smooth(0.0, 0.02, t) * (t < 1) * (skip > (1 - density) * 2 - 1)
        lit = (0.34 + 0.55 * dx * s.side / reach.clamp(min=0.05) + 0.22 * (saw - 0.5) + 0.22 * needle + 0.12 * t).clamp(
            0, 1
        )
        green = torch.lerp(s.rgb(0.13, 0.29, 0.20), s.rgb(0.21, 0.36, 0.20), s.u(f"{name}.hue", 0, 1)[:, None])
        colour = p.shade(green * (1 + 0.22 * size)[:, None], lit)
        if snow:
            load = smooth(0.35, 0.75, saw + 0.25 * needle + 0.3 * dx * s.side / reach.clamp(min=0.05))
            colour = torch.lerp(colour, p.shade(s.rgb(0.95, 0.97, 1.0), lit + 0.25), (load * 0.85)[:, None])
        trunk = c.edge((dx.abs() - 0.03) * width) * (t > -0.08) * (t < 0.05) * (skip > (1 - density) * 2 - 1)
        c.paint(trunk, p.far(p.shade(s.rgb(0.30, 0.20, 0.14), torch.full_like(trunk, 0.4)), depth), "pines")
        mist = smooth(0.35, -0.05, t) * 0.25
        c.paint(cover, p.far(colour, depth + mist * (0.3 + depth)), "pines")


def paint_tree(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A broad-leaved tree that stands at (x, y), ``size`` high."""
    p = s.palette
    dx, t = c.x - x, (c.y - y) / size
    bend = 0.05 * size * torch.sin(t * 2.5)
    bark = c.texture(160.0, 30.0, s.u("tree.bark", 0, 60), octaves=4, ridged=True, gain=0.6)[:, 0]
    half = size * (0.040 + 0.05 * (0.14 - t).clamp(0, 0.2) - 0.018 * t)
    trunk = c.edge((dx - bend).abs() - half * (1 + 0.05 * bark)) * (t > -0.03) * (t < 0.62)
    lit = (0.45 + 0.45 * dx * s.side / half).clamp(0, 1)
    c.paint(trunk, p.shade(s.rgb(0.40, 0.27, 0.18) * (1 + 0.18 * bark)[:, None], lit), "tree")
    leaf = c.texture(55.0, 55.0, s.u("tree.leaf", 0, 60), octaves=5, gain=0.66)
    crown = None
    light = None
    for i in range(7):
        cx = x + size * s.u(f"tree.{i}.x", -0.27, 0.27)
        cy = y + size * (0.66 + s.u(f"tree.{i}.y", -0.14, 0.17) + (0.09 if i < 2 else 0.0))
        r = size * s.u(f"tree.{i}.r", 0.13, 0.23)
        ex, ey = c.x - cx, c.y - cy
        d = (ex * ex + ey * ey).sqrt() - r - 0.013 * leaf[:, 0]
        glow = 0.5 + 0.30 * (ex * s.side + ey * 1.1) / r
        if crown is None or light is None:
            crown, light = d, glow
        else:
            light = torch.where(d < crown - 0.004, glow, light)
            crown = torch.minimum(crown, d)
    assert crown is not None and light is not None
    autumn = s.u("tree.autumn", 0, 1)[:, None]
    green = torch.lerp(s.rgb(0.24, 0.46, 0.20), s.rgb(0.42, 0.54, 0.20), s.u("tree.hue", 0, 1)[:, None])
    green = torch.where(autumn > 0.8, s.rgb(0.82, 0.45, 0.16), green)
    if s.spec.setting in ("snowfield", "snowy mountains"):
        green = torch.lerp(green, s.rgb(0.86, 0.91, 0.95), 0.6)
    shade = (light + 0.10 * leaf[:, 2] + 0.05 * leaf[:, 1] * s.side).clamp(0.02, 1)
    c.paint(c.edge(crown), p.shade(green * (1 + 0.10 * leaf[:, 0])[:, None], shade), "tree")


def paint_cactus(c: Canvas, s: Scene, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
    """A saguaro with two arms, ribs and spines."""
    p = s.palette
    dx, dy = c.x - x, c.y - y
    half = 0.085 * size

    def capsule(
        ax: torch.Tensor, low: torch.Tensor, high: torch.Tensor, r: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ey = dy - torch.minimum(torch.maximum(dy, low), high)
        ex = dx - ax
        return (ex * ex + ey * ey).sqrt() - r, ex / r

    def elbow(ax: torch.Tensor, level: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        ex = dx - torch.minimum(torch.maximum(dx, ax.clamp(max=0)), ax.clamp(min=0))
        ey = dy - level
        return (ex * ex + ey * ey).sqrt() - r

    body, across = capsule(torch.zeros_like(x), -0.2 * size, 0.93 * size, half)
    for k, sign in enumerate((-1.0, 1.0)):
        ax = sign * size * s.u(f"cactus.{k}.x", 0.20, 0.27)
        low = size * s.u(f"cactus.{k}.low", 0.34, 0.55)
        high = low + size * s.u(f"cactus.{k}.high", 0.16, 0.30)
        arm, arm_across = capsule(ax, low, high, half * 0.72)
        joint = elbow(ax, low, half * 0.72)
        arm_across = torch.where(joint < arm, (dy - low) / half * 0.7, arm_across)
        arm = torch.minimum(arm, joint)
        across = torch.where(arm < body, arm_across, across)
        body = torch.minimum(body, arm)
    angle = across.clamp(-0.99, 0.99).asin()
    rib = torch.cos(angle * 9.0) * fade(1.0, c.px / (half * 0.28))
    spine = noise(angle * 5.7, dy / size * 46.0)[:, 0]
    spine = smooth(0.5, 0.62, spine) * fade(1.0, c.px / (half * 0.20))
    lit = (0.52 + 0.42 * across * s.side + 0.14 * rib).clamp(0, 1)
    green = torch.lerp(s.rgb(0.22, 0.43, 0.25), s.rgb(0.33, 0.47, 0.28), s.u("cactus.hue", 0, 1)[:, None])
    colour = torch.lerp(p.shade(green, lit), p.shade(s.rgb(0.95, 0.90, 0.70), lit), (spine * 0.7)[:, None])
    c.paint(c.edge(body), colour, "cactus")
