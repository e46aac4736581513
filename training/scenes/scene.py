"""A batch of scenes of one spec: every number in it follows from a seed, so any view shows the same world."""

import zlib

import torch

from ..specs import Spec
from .palette import colour, make_palette, paints

_COLUMNS = 1024


def _uniforms(seeds: torch.Tensor) -> torch.Tensor:
    """``[B]`` int64 seeds to ``[B, 1024]`` uniform numbers in [0,1): splitmix64 (Steele et al., OOPSLA 2014)."""
    column = torch.arange(1, _COLUMNS + 1, device=seeds.device, dtype=torch.int64)
    z = seeds[:, None] * 0x2545F4914F6CDD1D + column * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return (z & 0xFFFFFF).float() / float(1 << 24)


class Scene:
    """``count`` scenes of one ``spec``. seeds: ``[B]`` int64; colours: ``[B]`` int64 index of the subject's paint.

    Tensors ``[B,1,1]``: horizon (its height), sun_x, sun_y (sun or moon), side (+1: light from the right).
    box: the main subject's (x, y, half size), or None. disc: radius of sun or moon where one shows, or None.
    """

    def __init__(self, spec: Spec, seeds: torch.Tensor, colours: torch.Tensor):
        self.spec, self.count, self.device = spec, len(seeds), seeds.device
        self._table = _uniforms(seeds)
        self.palette = make_palette(spec.time, spec.weather, self._table[:, :8])
        self.paint = paints(str(self.device))[colours].view(-1, 3, 1, 1)
        low = {"cliff": (0.30, 0.40), "sea": (0.30, 0.44), "beach": (0.42, 0.52), "lake": (0.36, 0.46)}
        self.horizon = self.u("horizon", *low.get(spec.setting, (0.30, 0.40)))
        self.sun_x = self.u("sun.x", 0.14, 0.86)
        if spec.time in ("sunset", "sunrise"):
            self.sun_y = self.horizon + self.u("sun.y", 0.045, 0.17)
        else:
            self.sun_y = self.u("sun.y", 0.84 if "mountains" in spec.setting else 0.74, 0.89)  # above most peaks
        self.side = torch.where(self.sun_x > 0.5, 1.0, -1.0)
        self.box: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.disc: torch.Tensor | None = None

    def u(self, name: str, low: float, high: float) -> torch.Tensor:
        """A uniform number of each scene that belongs to ``name``: ``[B,1,1]`` in [low, high)."""
        column = 8 + zlib.crc32(name.encode()) % (_COLUMNS - 8)
        return self._table[:, column].view(-1, 1, 1) * (high - low) + low

    def rgb(self, r: float, g: float, b: float) -> torch.Tensor:
        """A colour as ``[1,3,1,1]``."""
        return colour(r, g, b, str(self.device))

    @property
    def lamps(self) -> float:
        """How strongly windows and lamps shine: 0 by day, 1 at night."""
        dark = {"day": 0.0, "sunrise": 0.15, "sunset": 0.55, "dusk": 0.9, "night": 1.0}[self.spec.time]
        return max(dark, 0.6) if self.spec.weather in ("storm", "fog") else dark
