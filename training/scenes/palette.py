"""Light and colour: one harmonised palette for each time of day, bent by the weather. Colours are sRGB in [0,1]."""

from dataclasses import dataclass
from functools import lru_cache

import torch

# zenith, middle, horizon of the sky; light and ambient multiply surfaces; cloud_lit and cloud_dark; the deep of water
_TIMES = {
    "day": {
        "zenith": (0.20, 0.48, 0.82),
        "middle": (0.47, 0.72, 0.92),
        "horizon": (0.83, 0.92, 0.95),
        "sun": (1.00, 0.96, 0.82),
        "light": (1.03, 1.00, 0.94),
        "ambient": (0.52, 0.60, 0.74),
        "cloud_lit": (1.00, 1.00, 0.99),
        "cloud_dark": (0.70, 0.78, 0.87),
        "deep": (0.05, 0.26, 0.42),
    },
    "sunrise": {
        "zenith": (0.46, 0.60, 0.82),
        "middle": (0.83, 0.75, 0.82),
        "horizon": (1.00, 0.87, 0.72),
        "sun": (1.00, 0.90, 0.68),
        "light": (1.00, 0.84, 0.74),
        "ambient": (0.52, 0.48, 0.62),
        "cloud_lit": (1.00, 0.86, 0.80),
        "cloud_dark": (0.70, 0.62, 0.76),
        "deep": (0.22, 0.32, 0.48),
    },
    "sunset": {
        "zenith": (0.21, 0.17, 0.40),
        "middle": (0.80, 0.34, 0.36),
        "horizon": (1.00, 0.70, 0.30),
        "sun": (1.00, 0.78, 0.36),
        "light": (1.00, 0.66, 0.42),
        "ambient": (0.34, 0.25, 0.38),
        "cloud_lit": (1.00, 0.58, 0.38),
        "cloud_dark": (0.42, 0.23, 0.40),
        "deep": (0.20, 0.12, 0.27),
    },
    "dusk": {
        "zenith": (0.13, 0.13, 0.33),
        "middle": (0.33, 0.27, 0.50),
        "horizon": (0.72, 0.48, 0.56),
        "sun": (0.85, 0.62, 0.62),
        "light": (0.58, 0.48, 0.62),
        "ambient": (0.24, 0.22, 0.38),
        "cloud_lit": (0.62, 0.44, 0.58),
        "cloud_dark": (0.23, 0.20, 0.37),
        "deep": (0.10, 0.09, 0.22),
    },
    "night": {
        "zenith": (0.016, 0.030, 0.085),
        "middle": (0.040, 0.075, 0.170),
        "horizon": (0.105, 0.165, 0.290),
        "sun": (0.86, 0.90, 0.98),
        "light": (0.34, 0.43, 0.60),
        "ambient": (0.085, 0.115, 0.200),
        "cloud_lit": (0.17, 0.22, 0.34),
        "cloud_dark": (0.055, 0.080, 0.150),
        "deep": (0.015, 0.035, 0.080),
    },
}
# weather -> (share of grey, brightness, haze)
_WEATHERS = {
    "clear": (0.0, 1.0, 0.55),
    "cloudy": (0.15, 0.97, 0.6),
    "storm": (0.55, 0.66, 0.75),
    "fog": (0.45, 0.98, 1.5),
    "rain": (0.55, 0.80, 0.95),
    "snowfall": (0.40, 1.02, 0.95),
}
PAINTS = (
    (0.80, 0.16, 0.13),
    (0.17, 0.36, 0.68),
    (0.95, 0.76, 0.22),
    (0.20, 0.52, 0.33),
    (0.93, 0.92, 0.88),
    (0.93, 0.49, 0.16),
    (0.50, 0.27, 0.58),
    (0.47, 0.30, 0.19),
)


@lru_cache(maxsize=4096)
def colour(r: float, g: float, b: float, device: str) -> torch.Tensor:
    """A constant colour ``[1,3,1,1]`` on the device, made once: copying it each time would stall a GPU."""
    return torch.tensor((r, g, b), device=device).view(1, 3, 1, 1)


@lru_cache(maxsize=4)
def paints(device: str) -> torch.Tensor:
    """The subjects' paints ``[8,3]`` on the device, made once."""
    return torch.tensor(PAINTS, device=device)


@dataclass(kw_only=True)
class Palette:
    """Colours of a batch, each ``[B,3,1,1]``; haze: how strongly distance fades things."""

    zenith: torch.Tensor
    middle: torch.Tensor
    horizon: torch.Tensor
    sun: torch.Tensor
    light: torch.Tensor
    ambient: torch.Tensor
    cloud_lit: torch.Tensor
    cloud_dark: torch.Tensor
    deep: torch.Tensor
    haze: float

    def shade(self, base: torch.Tensor, lit: torch.Tensor) -> torch.Tensor:
        """Surface ``base`` (``[3]``, ``[B,3,1,1]`` or ``[B,3,H,W]``) under light ``lit`` ``[B,H,W]`` in [0,1]."""
        if base.dim() == 1:
            base = base.view(1, 3, 1, 1)
        return base * torch.lerp(self.ambient, self.light, lit[:, None])

    def snow(self, lit: torch.Tensor) -> torch.Tensor:
        """Snow under light ``lit`` ``[B,H,W]``: it keeps half of its white under a coloured sun."""
        white = torch.lerp(self.light, self.light.amax(1, keepdim=True).expand_as(self.light), 0.5)
        return colour(0.95, 0.975, 1.01, str(lit.device)) * torch.lerp(self.ambient, white, lit[:, None])

    def far(self, colour: torch.Tensor, depth: float | torch.Tensor) -> torch.Tensor:
        """``colour`` faded into the air: ``depth`` 0 is here, 1 the horizon."""
        amount = depth * self.haze
        if isinstance(amount, torch.Tensor):
            return torch.lerp(colour, self.horizon.expand_as(colour), amount.clamp(0, 0.94)[:, None])
        return colour + (self.horizon - colour) * min(amount, 0.94)


def make_palette(time: str, weather: str, jitter: torch.Tensor) -> Palette:
    """The palette of a time of day and a weather. jitter: ``[B,8]`` uniform numbers that vary it a little."""
    grey, brightness, haze = _WEATHERS[weather]
    device = str(jitter.device)
    if time == "night":
        brightness = max(brightness, 0.95) + (0.35 if weather in ("storm", "rain") else 0.0)
    tint = 1 + (jitter[:, :3].view(-1, 3, 1, 1) - 0.5) * 0.10
    exposure = brightness * (0.93 + 0.14 * jitter[:, 3].view(-1, 1, 1, 1))
    sway = (jitter[:, 4].view(-1, 1, 1, 1) - 0.5) * 0.5
    colours = {}
    for name, rgb in _TIMES[time].items():
        base = colour(*rgb, device)
        luma = (base * colour(0.3, 0.55, 0.15, device)).sum(1, keepdim=True)
        cool = luma * colour(0.93, 0.99, 1.06, device)
        keep = 0.55 if name in ("horizon", "sun") and time in ("sunset", "sunrise", "dusk") else 1.0
        colours[name] = ((base + (cool - base) * grey * keep) * exposure * tint).clamp(0, 1.15)
    # the middle of the sky leans to the horizon or to the zenith, picture by picture
    colours["middle"] = torch.where(
        sway > 0,
        torch.lerp(colours["middle"], colours["horizon"], sway.clamp(min=0)),
        torch.lerp(colours["middle"], colours["zenith"], (-sway).clamp(min=0)),
    )
    if weather == "fog":
        for name in ("zenith", "middle"):
            colours[name] = torch.lerp(colours[name], colours["horizon"], 0.55)
    return Palette(haze=haze, **colours)
