"""Trained upscalers of pictures (ESRGAN, SwinIR, DAT ...), opened by spandrel and run tile by tile.

The library finds the network by the names and shapes in its file (https://github.com/chaiNNer-org/spandrel). Tiles hang
on the picture alone, so its pixels are the same at any budget.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stages.config import ConfigError
from stages.memory.imports import light_imports
from stages.memory.planner import ModelProfile
from stages.memory.tensors import read_tensors
from stages.models.measure import whole
from stages.picture.picture import Picture

KEY, COMPONENT = "guide.upscale", "upscaler"
TILE, HALO = 96, 16  # pixels of the picture that is enlarged
_EXPECTED = (
    "a .safetensors file of an upscaler that spandrel knows (ESRGAN, SwinIR, DAT ...), two times or more, of RGB"
)


class Upscaler:
    """An opened one: ``scale`` times as high and wide, [0, 1] to [0, 1]."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Read all of its weights.

        Raises:
            ConfigError: it is none.
        """
        with without_torchvision():
            from spandrel import (  # type: ignore[import-not-found]
                ImageModelDescriptor,
                ModelLoader,
                UnsupportedModelError,
                canonicalize_state_dict,
            )
        try:
            found = ModelLoader().load_from_state_dict(canonicalize_state_dict(read_tensors(path)))
        except (UnsupportedModelError, ValueError, TypeError, LookupError, RuntimeError, AssertionError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ConfigError(KEY, str(path), _EXPECTED, f"spandrel says: {said or type(error).__name__}") from error
        whole = isinstance(found, ImageModelDescriptor) and found.purpose == "SR" and found.scale > 1
        if not whole or (found.input_channels, found.output_channels) != (3, 3):
            got = f"{path}: {found.architecture.name}, {found.scale} times, {found.input_channels} channels"
            raise ConfigError(KEY, got, _EXPECTED)
        found.model.requires_grad_(False).float().eval().to(device)
        self.model, self.scale, self._device = found.model, int(found.scale), device
        self._run: Any = found

    def __call__(self, crop: Tensor) -> Tensor:
        """``[1, 3, h, w]`` to ``[1, 3, scale h, scale w]``, on the CPU."""
        return self._run(crop.to(self._device)).cpu()

    def profile(self, tiles: int) -> ModelProfile:
        """What it takes; the weights of this one are gone then."""
        self.model.to("meta")
        side, plainly = TILE + 2 * HALO, unwrap(type(self._run).__call__)  # inference mode would hide operations

        def call() -> None:
            plainly(self._run, torch.empty((1, 3, side, side), device="meta"))

        return whole(COMPONENT, self.model, call, tiles)


def enlarge(upscaler: Upscaler, picture: Picture, file: Path, done: Callable[[], None] = lambda: None) -> Picture:
    """``picture`` through ``upscaler``, tile by tile, in a new ``file``; ``done`` is told of every tile."""
    scale = upscaler.scale
    found = Picture.create(file, picture.width * scale, picture.height * scale)
    for top in places(picture.height):
        bottom = min(top + TILE, picture.height)
        rows = torch.empty((1, 3, (bottom - top) * scale, found.width), dtype=torch.uint8)
        for left in places(picture.width):
            right = min(left + TILE, picture.width)
            above, before = max(0, top - HALO), max(0, left - HALO)
            crop = picture.pixels.box(
                above, before, min(picture.height, bottom + HALO), min(picture.width, right + HALO)
            )
            large = upscaler(crop.float() / 255)
            inner = large[
                ...,
                (top - above) * scale : (bottom - above) * scale,
                (left - before) * scale : (right - before) * scale,
            ]
            rows[..., left * scale : right * scale] = (inner * 255).round().to(torch.uint8)
            done()
        found.pixels.write(top * scale, rows)
    return found


def places(length: int) -> list[int]:
    """Where tiles begin: side by side, the last one where it is whole."""
    return sorted({min(start, max(0, length - TILE)) for start in range(0, length, TILE)})


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Two of spandrel's networks, which are no upscalers, ask for three functions of it. It may be hidden already."""
    functional: Any = ModuleType("torchvision.transforms.functional")
    functional.InterpolationMode = functional.rotate = functional.normalize = None
    made = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    made = {**made, functional.__name__: functional} if sys.modules.get("torchvision") is None else {}
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        with light_imports("torchvision"):
            yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)
