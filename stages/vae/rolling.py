"""The VAE over a whole canvas in one go: no pixel is computed twice, and of every layer a few rows are in memory.

Tiles compute their halos again and again: at 2048x2048 three times the pixels of the picture. Here all layers run at
once, each a few rows behind the one before. That needs statistics of the norms before the first row is there
(``stages.vae.shared``), and keys and values of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from stages.vae.exact import Hold
from stages.vae.exact_attention import attended
from stages.vae.exact_program import INPUT, Layer, Shape, shapes
from stages.vae.rolling_schedule import Schedule
from stages.vae.shared import SharedStatistics
from stages.vae.strips import convolved, finished, prepared, source_rows

Read = Callable[[int, int], Tensor]  # rows [top, bottom) of the input, [1, C, h, W]


class _Kept:
    """The rows ``[top, bottom)`` of an activation that are in memory, channels last."""

    def __init__(self, top: int) -> None:
        self._top, self._rows = top, torch.empty(0)

    def read(self, top: int, bottom: int) -> Tensor:
        """A view, ``[1, C, h, W]``."""
        return self._rows[:, :, top - self._top : bottom - self._top]

    def append(self, strip: Tensor) -> None:
        if self._rows.numel():
            before, (_, channels, height, width) = self._rows, strip.shape
            joined = strip.new_empty((1, before.shape[2] + height, width, channels)).permute(0, 3, 1, 2)
            joined[:, :, : before.shape[2]] = before
            joined[:, :, before.shape[2] :] = strip
            strip = joined
        self._rows = strip

    def drop(self, low: int) -> None:
        """Rows before ``low`` go, and their memory."""
        if low > self._top:
            rest, self._top = self._rows[:, :, low - self._top :], low
            self._rows = rest.clone() if rest.numel() else torch.empty(0)


class RollingPass:
    """One pass of a program of layers over a canvas.

    Args:
        layers: from ``program``.
        given: shape of the input.
        statistics: of the norms and attentions that the layers use.
        names: of these modules there.
        dtype: of the model's weights and activations.
        device: where the strips are computed.
        hold: keeps a module's weights in memory while a strip runs through it.
        mark: told the name of the layer that runs.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        given: Shape,
        statistics: SharedStatistics,
        names: Mapping[nn.Module, str],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        hold: Hold = nullcontext,
        mark: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._statistics, self._names = statistics, names
        self._dtype, self._device, self._hold, self._mark = dtype, torch.device(device), hold, mark
        self._shapes = shapes(list(layers), given)
        self.schedule = Schedule(layers, self._shapes, dtype.itemsize)

    @torch.no_grad()
    def rows(self, source: Read, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Strips of the last layer's result, from that of row ``first`` on: (its first row, ``[1, C, h, W]``)."""
        kept = {name: _Kept(top) for name, top in self.schedule.begun(first).items()}
        final = self.schedule.layers[-1]
        for layer, top, bottom, low in self.schedule.steps(first):
            self._mark(layer.name)
            with ExitStack() as held:
                for owner in layer.owners:
                    held.enter_context(self._hold(owner))
                strip = self._made(layer, source, kept, top, bottom)
            if layer is not final:
                kept[layer.name].append(strip)
            for name, row in low.items():
                kept[name].drop(row)
            if layer is final:
                yield top, strip
            del strip

    def _made(self, layer: Layer, source: Read, kept: Mapping[str, _Kept], top: int, bottom: int) -> Tensor:
        full = self._shapes[layer.source].size.height
        wanted = source_rows(layer, top, bottom, full)
        if layer.source == INPUT:
            rows = source(*wanted).to(self._device, self._dtype)
        else:
            rows = kept[layer.source].read(*wanted)
        moments = self._statistics.norms[self._names[layer.norm]] if layer.norm is not None else None
        rows = prepared(layer, rows, moments)
        if layer.attention is not None:
            strip = attended(layer.attention, rows, *self._statistics.attentions[self._names[layer.attention]])
        else:
            strip = convolved(layer, rows, top, bottom, full)
        del rows
        return finished(layer, strip, None if layer.residual is None else kept[layer.residual].read(top, bottom))
