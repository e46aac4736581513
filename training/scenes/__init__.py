"""Procedural scenes: analytic shapes and band-limited noise, rendered in torch, sharp at any zoom."""

import torch

from ..specs import Spec
from .canvas import MATERIALS, Canvas, View
from .compose import paint_scene
from .scene import Scene

__all__ = ["MATERIALS", "Canvas", "Scene", "Spec", "View", "render"]


@torch.no_grad()
def render(spec: Spec, seeds: torch.Tensor, colours: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Render ``B`` scenes of one spec.

    seeds: ``[B]`` int64. colours: ``[B]`` int64, the subject's paint (index of ``specs.COLOURS``). view: of ``B``.
    Returns the pictures ``[B,3,H,W]`` float32 in [-1,1] and the material ids ``[B,H,W]`` uint8 (``MATERIALS``).
    Deterministic: the same seeds and views give the same pixels on the same device. No device synchronisation.
    """
    if not len(seeds) == len(colours) == len(view.zoom):
        raise ValueError(
            f"render: got {len(seeds)} seeds, {len(colours)} colours, {len(view.zoom)} views; expected equal counts"
        )
    canvas, scene = Canvas(view), Scene(spec, seeds, colours)
    paint_scene(canvas, scene)
    return canvas.rgb * 2 - 1, canvas.ids
