"""What a layer of the VAE makes of rows of its source: shared by the exact pass and the rolling one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stages.vae.exact_program import Layer
from stages.vae.groupnorm import normalise


def source_rows(layer: Layer, top: int, bottom: int, full: int) -> tuple[int, int]:
    """(first, last) of the source's ``full`` rows that rows ``[top, bottom)`` of the result are made from."""
    if layer.conv is None:
        return top, bottom
    if layer.move == "down":  # stride 2 over one row and column of zeros at the end
        return 2 * top, min(2 * bottom + 1, full)
    radius, scale = int(layer.conv.padding[0]), 2 if layer.move == "up" else 1
    return max(0, top - radius) // scale, -(-min(bottom + radius, full * scale) // scale)


def prepared(layer: Layer, rows: Tensor, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows ``[1, C, h, W]`` of the source as the convolution or attention takes them: normalised, activated.

    ``moments``: (variance, mean) of the norm's groups, ``[G]`` each.
    """
    if layer.before is not None:
        rows = layer.before(rows)
    if layer.norm is not None:
        assert moments is not None
        rows = normalise(rows, *moments, layer.norm.weight, layer.norm.bias, layer.norm.eps)
    if isinstance(layer.act, nn.SiLU):
        return F.silu(rows, inplace=layer.norm is not None)  # of rows that are this call's own
    return rows if layer.act is None else layer.act(rows)


def convolved(layer: Layer, rows: Tensor, top: int, bottom: int, full: int) -> Tensor:
    """Rows ``[top, bottom)`` of the target, of the prepared ``source_rows`` and nothing else."""
    conv = layer.conv
    assert conv is not None
    if layer.move == "down":
        return F.conv2d(F.pad(rows, (0, 1, 0, max(0, 2 * bottom + 1 - full))), conv.weight, conv.bias, stride=2)
    radius, scale = int(conv.padding[0]), 2 if layer.move == "up" else 1
    if layer.move == "up":
        first, last = max(0, top - radius), min(bottom + radius, full * scale)
        rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
        start = first - first // 2 * 2
        rows = rows[:, :, start : start + last - first]
    missing = max(0, radius - top), max(0, bottom + radius - full * scale)
    if any(missing):  # zeros beyond the canvas, as the whole convolution pads
        rows = F.pad(rows, (0, 0, *missing))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, int(conv.padding[1])))


def finished(layer: Layer, strip: Tensor, residual: Tensor | None) -> Tensor:
    """The strip, in place, with the residual's rows added; divided and projected as the layer says."""
    if residual is not None:
        strip += residual if layer.shortcut is None else layer.shortcut(residual)
    if layer.divide != 1:
        strip /= layer.divide
    return strip if layer.after is None else layer.after(strip)
