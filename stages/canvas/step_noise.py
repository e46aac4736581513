"""The noise that ancestral schedulers add in a step: drawn for the whole canvas, handed out in row bands.

A scheduler that is given a band would draw the band's noise only, and the canvas would depend on how it is cut. All
schedulers of diffusers draw through ``randn_tensor``, as their module imports it; during a step it is this one's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.canvas.noise import fill
from stages.memory.rows import Rows

_NAME = "randn_tensor"


class StepNoise:
    """Of one step of a canvas.

    Args:
        folder: for the noise, one file a draw.
        shape: (C, H, W) of the canvas.
        generator: that the scheduler is given.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        self._folder, self._shape, self._generator = folder, shape, generator
        self._drawn: list[Rows] = []
        self._next, self._band = 0, (0, 0)

    def turn_to(self, top: int, bottom: int) -> None:
        """The scheduler steps these rows now."""
        if self._band != (0, 0) and self._next != len(self._drawn):
            raise RuntimeError("a scheduler drew noise for some rows of the canvas only.")
        self._next, self._band = 0, (top, bottom)

    def draw(self, shape: Sequence[int], generator: Any = None, **_: Any) -> Tensor:
        """Stands in for diffusers' ``randn_tensor``: ``[1, C, h, W]`` float32 of this band."""
        top, bottom = self._band
        expected = (1, self._shape[0], bottom - top, self._shape[2])
        if generator is not self._generator or tuple(shape) != expected:
            raise RuntimeError(f"a scheduler drew noise of shape {tuple(shape)}, expected {expected}.")
        if self._next == len(self._drawn):
            if top:
                raise RuntimeError("a scheduler drew noise for some rows of the canvas only.")
            rows = Rows.create(self._folder / f"step_noise_{self._next}.safetensors", self._shape)
            fill(rows, self._generator)
            self._drawn.append(rows)
        self._next += 1
        return self._drawn[self._next - 1].read(top, bottom)

    @contextmanager
    def given_to(self, scheduler: Any) -> Iterator[StepNoise]:
        """Within, ``scheduler`` draws from here."""
        module: Any = sys.modules[type(scheduler).__module__]
        original = getattr(module, _NAME, None)
        if original is None:  # it draws nothing
            yield self
            return
        setattr(module, _NAME, self.draw)
        try:
            yield self
        finally:
            setattr(module, _NAME, original)
