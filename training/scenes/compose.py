"""Composition: which layers each setting has, back to front, and where the main subject stands."""

from collections.abc import Callable

import torch

from .buildings import paint_castle, paint_house, paint_lighthouse, paint_windmill
from .canvas import Canvas
from .craft import paint_balloon, paint_birds, paint_bridge, paint_sailboat, paint_ship, paint_tent
from .land import (
    Profile,
    cliff_line,
    grass_colour,
    hill_line,
    paint_cliff,
    paint_dune,
    paint_hill,
    paint_mountains,
    ridge_line,
)
from .plants import paint_cactus, paint_pines, paint_tree
from .scene import Scene
from .sky import paint_sky
from .water import paint_beach, paint_water
from .weather import paint_weather

# subject -> (painter, least and greatest height in world units) for what stands on ground
_STANDING: dict[str, tuple[Callable[..., None], float, float]] = {
    "lighthouse": (paint_lighthouse, 0.40, 0.50),
    "house": (paint_house, 0.27, 0.38),
    "castle": (paint_castle, 0.38, 0.48),
    "windmill": (paint_windmill, 0.38, 0.48),
    "tree": (paint_tree, 0.34, 0.46),
    "tent": (paint_tent, 0.19, 0.27),
    "cactus": (paint_cactus, 0.32, 0.44),
}
_SNOW = (0.93, 0.96, 1.0)


def paint_scene(c: Canvas, s: Scene) -> None:
    """Paint everything; afterwards ``s.box`` holds the main subject's place."""
    paint_sky(c, s)
    if s.spec.subject == "birds":
        paint_birds(c, s)
        s.box = (s.u("flock.x", 0.30, 0.70), s.u("flock.y", 0.66, 0.82), s.u("flock.spread", 0.10, 0.20))
    _LAYOUTS[s.spec.setting](c, s)
    if s.spec.subject == "balloon":
        size = s.u("subject.size", 0.34, 0.46)
        x, y = s.u("subject.x", 0.25, 0.75), s.u("subject.y", 0.42, 0.50)
        paint_balloon(c, s, x, y, size)
        s.box = (x, y + size * 0.5, size * 0.5)
    paint_weather(c, s)


def _stand(
    c: Canvas, s: Scene, ground: Profile, low: float = 0.28, high: float = 0.72, grow: float = 1.0, sink: float = 0.008
) -> None:
    """Put the main subject, if it is one that stands, on ``ground`` at an x between ``low`` and ``high``."""
    entry = _STANDING.get(s.spec.subject)
    if entry is None:
        return
    painter, least, most = entry
    x = s.u("subject.x", low, high)
    size = s.u("subject.size", least, most) * grow
    y = ground(x) - sink
    painter(c, s, x, y, size)
    s.box = (x, y + size * 0.5, size * 0.5)


def _float(c: Canvas, s: Scene) -> None:
    """Put a boat or a ship on the water."""
    if s.spec.subject not in ("sailboat", "ship"):
        return
    sail = s.spec.subject == "sailboat"
    size = s.u("subject.size", 0.38, 0.54) if sail else s.u("subject.size", 0.22, 0.30)
    x, y = s.u("subject.x", 0.30, 0.70), s.horizon - s.u("subject.y", 0.04, 0.12)
    if s.spec.setting == "cliff":
        x, size = torch.where(s.u("cliff.side", 0, 1) > 0.5, x * 0.5 + 0.02, 0.98 - x * 0.5), size * 0.6
    (paint_sailboat if sail else paint_ship)(c, s, x, y, size)
    s.box = (x, y + 0.3 * size, 0.55 * size)


def _backdrop(c: Canvas, s: Scene, foot: torch.Tensor, reach: float = 1.0) -> list[tuple[Profile, torch.Tensor]]:
    """Far hills or mountains; returns their skylines and the colour of their reflection."""
    kind = s.spec.backdrop
    p = s.palette
    if kind == "none":
        return []
    if kind == "hills":
        line = hill_line(c, s, "far", foot + 0.035 * reach, 0.05 * reach, 2.6)
        colour = grass_colour(s) * 0.75
        paint_hill(c, s, "far", line, depth=0.62, base=colour)
        return [(line, p.far(p.shade(colour, torch.full_like(foot, 0.4)), 0.5))]
    snow = 0.62 if kind == "snowy mountains" else None
    line = ridge_line(c, s, "far", foot + 0.02, s.u("far.height", 0.15, 0.25) * reach, 2.3)
    paint_mountains(c, s, "far", line, depth=0.50, snow=snow, foot=foot)
    tint = s.rgb(0.72, 0.76, 0.82) if snow else s.rgb(0.46, 0.46, 0.48)
    return [(line, p.far(p.shade(tint, torch.full_like(foot, 0.5)), 0.45))]


def _sea(c: Canvas, s: Scene) -> None:
    paint_water(c, s, _backdrop(c, s, s.horizon, 0.55))
    _float(c, s)
    if s.spec.subject == "lighthouse":  # on a rocky islet
        x, seed = s.u("subject.x", 0.28, 0.72), s.u("islet.seed", 0, 60)
        level = s.horizon - 0.055

        def islet(at: torch.Tensor) -> torch.Tensor:
            from .noise import profile

            rough = profile(at * 7.0, c.px * 7.0, c.finest * 7.0, seed, octaves=6)
            return level + 0.085 - 2.9 * (at - x) ** 2 + 0.02 * rough * (1 - 3 * (at - x).abs()).clamp(0, 1)

        shore = c.edge(level - c.y, 0.004)
        keep, ids = c.rgb, c.ids
        paint_cliff(c, s, islet, s.side)
        c.rgb = torch.lerp(keep, c.rgb, shore[:, None])
        c.ids = torch.where(shore > 0.5, c.ids, ids)
        lace = c.texture(30.0, 90.0, s.u("islet.foam", 0, 60), octaves=5, gain=0.6)[:, 0]
        foam = (1 - ((c.y - level + 0.004 * lace).abs() / 0.009)).clamp(0, 1) * ((c.x - x).abs() < 0.175 + 0.02 * lace)
        c.paint(foam * 0.8, s.palette.shade(s.rgb(0.96, 0.98, 0.98), torch.full_like(foam, 0.8)))
        _stand(c, s, islet, sink=0.012, grow=0.92)


def _cliff(c: Canvas, s: Scene) -> None:
    paint_water(c, s, _backdrop(c, s, s.horizon, 0.45))
    line, side, brink = cliff_line(c, s)
    _float(c, s)
    offset = s.u("subject.inland", 0.10, 0.24)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return line(x)

    if s.spec.subject in _STANDING:
        painter, least, most = _STANDING[s.spec.subject]
        x = brink + side * offset
        size = s.u("subject.size", least, most)
        y = shifted(x) - 0.014
        painter(c, s, x, y, size)
        s.box = (x, y + size * 0.5, size * 0.5)
    paint_cliff(c, s, line, side)
    lace = c.texture(26.0, 70.0, s.u("cliff.foam", 0, 60), octaves=5, gain=0.6)[:, 0]
    shore = (c.x - brink) * side
    foam = (1 - ((shore + 0.115 - 0.25 * (s.horizon - c.y) + 0.02 * lace).abs() / 0.018)).clamp(0, 1) * (
        c.y < s.horizon - 0.02
    )
    c.paint(
        foam * (0.45 + 0.5 * lace).clamp(0, 0.8), s.palette.shade(s.rgb(0.96, 0.98, 0.98), torch.full_like(foam, 0.8))
    )


def _beach(c: Canvas, s: Scene) -> None:
    paint_water(c, s, _backdrop(c, s, s.horizon, 0.55))
    _float(c, s)
    line = paint_beach(c, s)
    _stand(c, s, lambda x: line(x) - 0.03)


def _lake(c: Canvas, s: Scene) -> None:
    mirror = _backdrop(c, s, s.horizon)
    shore = hill_line(c, s, "shore", s.horizon + 0.012, 0.010, 3.0)
    cold = s.spec.backdrop == "snowy mountains" and s.spec.weather == "snowfall"
    paint_pines(c, s, "shore", shore, width=0.034, height=0.062, depth=0.34, snow=cold)
    wood = s.palette.far(s.palette.shade(s.rgb(0.15, 0.30, 0.21), torch.full_like(s.horizon, 0.3)), 0.3)
    paint_water(c, s, [*mirror, (lambda x: shore(x) + 0.045, wood)])
    if s.spec.subject == "bridge":
        deck = s.horizon + s.u("bridge.deck", 0.02, 0.07)
        water = s.horizon - s.u("bridge.water", 0.13, 0.18)
        paint_bridge(c, s, deck, water)
        s.box = (torch.full_like(deck, 0.5), deck - 0.06, torch.full_like(deck, 0.3))
    _float(c, s)
    near = hill_line(c, s, "near", s.u("near.base", 0.09, 0.16), 0.035, 2.0)
    _stand(c, s, near)
    paint_hill(c, s, "near", near, depth=0.0, base=grass_colour(s))


def _range(c: Canvas, s: Scene, snow: bool) -> None:
    foot = s.horizon
    levels = ((0.62, 0.30, 2.0), (0.34, 0.24, 2.4), (0.12, 0.15, 3.0))
    for i, (depth, height, frequency) in enumerate(levels):
        base = foot + 0.10 - 0.11 * i
        line = ridge_line(c, s, f"range{i}", base, height * s.u(f"range{i}.h", 0.85, 1.25), frequency)
        amount = (0.80, 0.68, 0.60)[i] if snow else None
        paint_mountains(
            c, s, f"range{i}", line, depth=depth, snow=amount, foot=base - 0.03 - 0.03 * i, scale=1.0 + 0.25 * i
        )
    ground = hill_line(c, s, "vale", foot - 0.08, 0.035, 1.6)
    kind, base_colour = ("snow", s.rgb(*_SNOW)) if snow else ("grass", grass_colour(s) * 0.92)
    bridge = s.spec.subject == "bridge"
    paint_hill(c, s, "vale", ground, depth=0.16, base=base_colour, kind=kind)
    paint_pines(
        c, s, "vale", lambda x: ground(x) - 0.03, width=0.045, height=0.085, depth=0.12, snow=snow, density=0.75
    )
    near = hill_line(c, s, "near", foot - 0.19, 0.03, 1.8)
    if bridge:
        paint_bridge(c, s, foot - 0.02, foot - 0.22)
        s.box = (torch.full_like(foot, 0.5), foot - 0.10, torch.full_like(foot, 0.3))
    _stand(c, s, near)
    paint_hill(c, s, "near", near, depth=0.0, base=base_colour, kind=kind)


def _desert(c: Canvas, s: Scene) -> None:
    _backdrop(c, s, s.horizon, 0.6)
    for i, (depth, drop, height, frequency) in enumerate(
        ((0.55, -0.03, 0.05, 2.4), (0.30, 0.06, 0.06, 1.9), (0.08, 0.15, 0.06, 1.6))
    ):
        line = hill_line(c, s, f"dune{i}", s.horizon - drop, height, frequency)
        paint_dune(c, s, f"dune{i}", line, depth=depth, size=0.6 + 0.45 * i)
    near = hill_line(c, s, "dune3", s.horizon - 0.22, 0.035, 1.4)
    _stand(c, s, near, sink=0.012)
    paint_dune(c, s, "dune3", near, depth=0.0, size=2.2)


def _forest(c: Canvas, s: Scene) -> None:
    _backdrop(c, s, s.horizon + 0.05)
    snow = s.spec.weather == "snowfall"
    rows = ((0.62, 0.05, 0.050, 0.13), (0.42, -0.01, 0.072, 0.20), (0.22, -0.08, 0.100, 0.28))
    for i, (depth, lift, width, height) in enumerate(rows):
        ground = hill_line(c, s, f"wood{i}", s.horizon + lift, 0.02, 2.0)
        tint = s.rgb(*_SNOW) if snow else grass_colour(s) * 0.55
        paint_pines(c, s, f"wood{i}", ground, width=width, height=height, depth=depth, snow=snow)
        paint_hill(
            c,
            s,
            f"wood{i}",
            lambda x, g=ground: g(x) - 0.004,
            depth=depth * 0.8,
            base=tint,
            kind="snow" if snow else "grass",
        )
    near = hill_line(c, s, "near", s.horizon - 0.15, 0.03, 1.7)
    if s.spec.subject == "bridge":
        paint_bridge(c, s, s.horizon - 0.02, s.horizon - 0.20)
        s.box = (torch.full_like(s.horizon, 0.5), s.horizon - 0.1, torch.full_like(s.horizon, 0.3))
    _stand(c, s, near)
    tint = s.rgb(*_SNOW) if snow else grass_colour(s) * 0.8
    paint_hill(c, s, "near", near, depth=0.0, base=tint, kind="snow" if snow else "grass")
    if s.spec.subject == "none":
        paint_pines(c, s, "front", lambda x: near(x) - 0.10, width=0.21, height=0.50, depth=0.0, snow=snow, density=0.5)


def _meadow(c: Canvas, s: Scene) -> None:
    _backdrop(c, s, s.horizon + 0.02)
    green = grass_colour(s)
    for i, (depth, drop, height) in enumerate(((0.55, -0.02, 0.035), (0.32, 0.05, 0.045), (0.12, 0.12, 0.045))):
        line = hill_line(c, s, f"hill{i}", s.horizon - drop, height, 1.9)
        if i < 2:
            paint_pines(
                c,
                s,
                f"hill{i}",
                lambda x, g=line: g(x) + 0.004,
                width=0.035 + 0.02 * i,
                height=0.03 + 0.02 * i,
                depth=depth,
                snow=False,
                density=0.35,
            )
        paint_hill(c, s, f"hill{i}", line, depth=depth, base=green * (0.86 + 0.07 * i))
    near = hill_line(c, s, "near", s.horizon - 0.17, 0.04, 1.3)
    _stand(c, s, near)
    paint_hill(c, s, "near", near, depth=0.0, base=green)


def _snowfield(c: Canvas, s: Scene) -> None:
    _backdrop(c, s, s.horizon + 0.01)
    white = s.rgb(*_SNOW)
    for i, (depth, drop, height) in enumerate(((0.50, -0.01, 0.03), (0.22, 0.07, 0.04))):
        line = hill_line(c, s, f"field{i}", s.horizon - drop, height, 1.8)
        paint_pines(
            c,
            s,
            f"field{i}",
            line,
            width=0.045 + 0.03 * i,
            height=0.07 + 0.05 * i,
            depth=depth,
            snow=True,
            density=0.45,
        )
        paint_hill(c, s, f"field{i}", line, depth=depth, base=white, kind="snow")
    near = hill_line(c, s, "near", s.horizon - 0.16, 0.035, 1.4)
    _stand(c, s, near)
    paint_hill(c, s, "near", near, depth=0.0, base=white, kind="snow")


_LAYOUTS: dict[str, Callable[[Canvas, Scene], None]] = {
    "sea": _sea,
    "lake": _lake,
    "beach": _beach,
    "cliff": _cliff,
    "mountains": lambda c, s: _range(c, s, False),
    "snowy mountains": lambda c, s: _range(c, s, True),
    "desert": _desert,
    "forest": _forest,
    "meadow": _meadow,
    "snowfield": _snowfield,
}
