"""Products of 8-bit integers by oneDNN's convolutions, with weights that lie as it computes with them.

A layer has such products where this machine's oneDNN wants its weight in blocks (:mod:`stages.blocked`); elsewhere it
has its own (:mod:`stages.int8`, whose ``Int8`` and ``Scaled`` are the layers and samples here). A linear layer is a
convolution of 1x1 over its rows. Samples are unsigned, and what is zero among them is a number: borders are filled with
it, and its part of a sum is taken off with the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stages.blocked import Blocks, alias, wanted
from stages.memory.trace import count

FASTER = 2.0  # than products in float32, measured with what stands around them (``python -m benchmarks integers``)
LEAST = 640  # numbers of a window or row: with fewer, what stands around a product takes what it gains
ROWS = 512  # of a linear layer at a time: with more, kernels of some widths are nine times as slow
UNSIGNED = 128  # what is added to an integer of a sample
_OUTPUTS, _INPUTS = 1280, 640  # of a layer that oneDNN is asked about, at most
_WIDE = 32  # rows of a linear layer that are one row of the image


def blocks_of(shape: Sequence[int], stride: Sequence[int]) -> Blocks | None:
    """How oneDNN wants a weight ``[O, I]`` or ``[O, I, h, w]`` of a layer of 8-bit integers; None: not in blocks, or
    there are too few numbers (``python -m benchmarks integers``)."""
    kernel = tuple(shape[2:]) or (1, 1)
    if math.prod(shape[1:]) < LEAST:
        return None
    most = _INPUTS if kernel == (1, 1) else _INPUTS // 5
    asked = math.gcd(shape[0], _OUTPUTS), math.gcd(shape[1], most)  # of so many the kernels are the same
    return wanted((*asked, *kernel), (0, 0), tuple(stride), torch.int8)


def convolve(layer: Any, sample: Any, size: Sequence[int], padding: Sequence[int], result: Tensor) -> None:
    """A sample's numbers ``[H, W, C]`` with the layer's weight into ``result`` ``[h, w, O]``."""
    (up, left), (height, width, channels) = padding, size
    shape, inner = (height + 2 * up, width + 2 * left, channels), slice(up, up + height)
    padded = sample.numbers.new_full(shape, _zero(sample), dtype=torch.uint8) if up or left else None
    whole = sample.numbers.new_empty(shape, dtype=torch.uint8) if padded is None else padded
    sample.rounds(whole[inner, left : left + width], UNSIGNED)
    part = _Part(layer, sample, 0, len(layer.weight))
    result.copy_(part(whole, result.shape[:2], result.dtype))


def multiply(layer: Any, sample: Any, result: Tensor, *, gates: bool = False) -> None:
    """A sample's rows ``[M, K]`` times the layer's weight into ``result`` ``[M, O]``; ``gates``: into ``[M, O / 2]``,
    the first outputs times GELU of the others."""
    rows, outputs = len(result), len(layer.weight)
    integers = sample.numbers.new_empty(sample.numbers.shape, dtype=torch.uint8)
    sample.rounds(integers, UNSIGNED)
    ends = (0, outputs // 2, outputs) if gates else (0, outputs)
    parts = [_Part(layer, sample, first, last) for first, last in pairwise(ends)]
    for first in range(0, rows, ROWS):
        some, target = integers[first : first + ROWS], result[first : first + ROWS]
        wide = _WIDE if len(some) % _WIDE == 0 else 1
        image = some.view(-1, wide, some.shape[-1])
        made = [part(image, image.shape[:2], result.dtype).reshape(len(some), -1) for part in parts]
        if gates:
            torch.mul(made[0], torch.ops.aten.gelu.out(made[1], out=made[1]), out=target)
        else:
            target.copy_(made[0])


class _Part:
    """Some outputs of a layer, of one sample."""

    def __init__(self, layer: Any, sample: Any, first: int, last: int) -> None:
        blocks, weight = layer.blocks, layer.weight[first:last]
        assert blocks is not None
        self._numbers = weight.numel()
        self._stride, self._kernel = layer.stride, tuple(weight.shape[2:]) or (1, 1)
        self._scale = sample.scale
        self._scales = layer.weight_scale[first:last].float()
        self._bias = self._scales * layer.weight_sum[first:last] * (-sample.scale * _zero(sample))
        if layer.bias is not None:
            self._bias += layer.bias[first:last]
        self._zeros = layer.weight_sum.new_zeros(last - first)
        if not weight.is_meta:
            self._weight = alias(weight, blocks, (*weight.shape[:2], *self._kernel))

    def __call__(self, image: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``[h, w, O]`` of integers ``[H, W, C]``."""
        if image.is_meta:
            count(int(2 * size[0] * size[1] * self._numbers / FASTER))
            return image.new_empty((*size, len(self._zeros)), dtype=dtype)
        convolution: Callable[..., Tensor] = torch.ops.onednn.qconv2d_pointwise
        given, weights = image.permute(2, 0, 1)[None], (self._weight, self._scales, self._zeros, self._bias)
        how = (self._stride, (0, 0), (1, 1), 1, 1.0, 0, dtype, "none", [], "")
        return convolution(given, self._scale, 0, *weights, *how)[0].permute(1, 2, 0)


def _zero(sample: Any) -> int:
    return int(sample.zero) + UNSIGNED
