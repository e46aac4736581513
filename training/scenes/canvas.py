"""The view of a world, the picture painted on it back to front, and small shape helpers.

World coordinates: x to the right and y up, the whole scene is [0,1] x [0,1]. Any view of it is sharp.
"""

from dataclasses import dataclass

import torch

from .noise import fbm

MATERIALS = (
    "sky",
    "clouds",
    "sun",
    "moon",
    "rock",
    "snow",
    "water",
    "sand",
    "cliff",
    "grass",
    "pines",
    "lighthouse",
    "house",
    "sailboat",
    "ship",
    "castle",
    "tree",
    "bridge",
    "windmill",
    "tent",
    "balloon",
    "birds",
    "cactus",
)
MATERIAL_INDEX = {name: index for index, name in enumerate(MATERIALS)}


@dataclass(kw_only=True)
class View:
    """Where a batch of pictures looks. centre_x, centre_y, zoom: ``[B]`` in world units; size: pixels a side.

    max_zoom: an upper bound of ``zoom`` as a float, known without reading the device.
    """

    centre_x: torch.Tensor
    centre_y: torch.Tensor
    zoom: torch.Tensor
    max_zoom: float
    size: int = 256

    @staticmethod
    def whole(count: int, device: torch.device | str = "cpu", size: int = 256) -> "View":
        """The whole scene, ``count`` times."""
        half = torch.full((count,), 0.5, device=device)
        return View(centre_x=half, centre_y=half, zoom=torch.ones(count, device=device), max_zoom=1.0, size=size)


class Canvas:
    """A picture being painted. rgb ``[B,3,H,W]`` in [0,1]; ids ``[B,H,W]``: index of the material that shows."""

    def __init__(self, view: View):
        size, device = view.size, view.zoom.device
        step = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size - 0.5
        zoom = view.zoom.view(-1, 1, 1)
        self.x = view.centre_x.view(-1, 1, 1) + step.view(1, 1, -1) / zoom
        self.y = view.centre_y.view(-1, 1, 1) - step.view(1, -1, 1) / zoom
        self.px = 1.0 / (size * zoom)
        self.finest = 1.0 / (size * view.max_zoom)
        self.count, self.size, self.device = len(view.zoom), size, device
        self.rgb = torch.zeros(self.count, 3, size, size, device=device)
        self.ids = torch.zeros(self.count, size, size, device=device, dtype=torch.uint8)

    def edge(self, distance: torch.Tensor, soft: float | torch.Tensor = 0.0) -> torch.Tensor:
        """Coverage of a shape from its signed distance (world units, negative inside), antialiased over one pixel."""
        return (0.5 - distance / (self.px + soft)).clamp(0, 1)

    def paint(self, cover: torch.Tensor, colour: torch.Tensor, material: str | None = None) -> None:
        """Lay ``colour`` (``[3]``, ``[B,3,1,1]`` or ``[B,3,H,W]``) over the picture with ``cover`` ``[B,H,W]``."""
        if colour.dim() == 1:
            colour = colour.view(1, 3, 1, 1)
        cover = cover.expand(self.count, self.size, self.size)
        self.rgb = torch.lerp(self.rgb, colour.expand_as(self.rgb), cover[:, None])
        if material is not None:
            self.ids = torch.where(cover > 0.5, MATERIAL_INDEX[material], self.ids)

    def add(self, amount: torch.Tensor, colour: torch.Tensor) -> None:
        """Add light: ``amount`` ``[B,H,W]`` of ``colour``; like a screen blend, so that nothing clips hard."""
        light = (amount[:, None] * colour).clamp(0, 1)
        self.rgb = 1 - (1 - self.rgb) * (1 - light)

    def texture(
        self,
        fx: float,
        fy: float,
        seed: torch.Tensor,
        *,
        octaves: int = 5,
        gain: float = 0.5,
        ridged: bool = False,
        x: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of ``fx`` by ``fy`` cells a world unit, ``[B,3,H,W]``: value and derivatives per cell."""
        x = self.x if x is None else x
        y = self.y if y is None else y
        top = max(fx, fy)
        return fbm(
            x * fx, y * fy, self.px * top, self.finest * top, octaves=octaves, gain=gain, ridged=ridged, seed=seed
        )


def smooth(low: float | torch.Tensor, high: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Smoothstep of ``x`` from ``low`` to ``high``."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def box(dx: torch.Tensor, dy: torch.Tensor, half_w: torch.Tensor | float, half_h: torch.Tensor | float) -> torch.Tensor:
    """Signed distance (Chebyshev) to a box around the origin."""
    return torch.maximum(dx.abs() - half_w, dy.abs() - half_h)


def stripes(t: torch.Tensor, duty: float, px: torch.Tensor) -> torch.Tensor:
    """Antialiased periodic stripes: 1 for the first ``duty`` of each unit of ``t``; fades to ``duty`` below two pixels.

    px: the pixel footprint in units of ``t``.
    """
    u = (t + (1 - duty) / 2).remainder(1.0) - 0.5
    on = (0.5 + (duty / 2 - u.abs()) / px).clamp(0, 1)
    weight = ((1 / px - 1.6) / 2.0).clamp(0, 1)
    return duty + (on - duty) * weight


def bricks(
    u: torch.Tensor, v: torch.Tensor, px_u: torch.Tensor, px_v: torch.Tensor, joint: float = 0.12
) -> torch.Tensor:
    """1 in the joints of a running brick bond, 0 in the bricks; ``u`` and ``v`` count bricks, px their footprints."""
    row = v.floor()
    across = stripes(u + 0.5 * row.remainder(2.0), joint * 0.6, px_u)
    along = stripes(v, joint, px_v)
    return torch.maximum(across.expand_as(along + across), along)
