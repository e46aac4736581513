"""Products of 8-bit integers by oneDNN's convolutions, with weights that lie as it computes with them.

A layer has such products where this machine's oneDNN wants its weight in blocks (:mod:`stages.blocked`); elsewhere it
has its own (:mod:`stages.int8`, whose ``Int8`` and ``Scaled`` are the layers and samples here). A linear layer is a
convolution of 1x1 over its rows. Samples are unsigned, and what is zero among them is a number: borders are filled with
it, and its part of a sum is taken off with the bias.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.blocked import Blocks, alias, taken, wanted
from stages.memory.trace import count

FASTER = 2.0  # than products in float32, measured with what stands around them (``python -m benchmarks integers``)
LEAST = 320  # numbers of a window or row: with fewer, what stands around a product takes what it gains
ROWS = 512  # of a linear layer at a time, where they make as many results as ``RESULTS`` or more
RESULTS = 1 << 19  # numbers of a part's result at a time, where more rows than ``ROWS`` make no more of them
FEWER = (1024, 512, 384, 256, 128, 64)  # rows at a time, where oneDNN wants the weight otherwise for more
UNSIGNED = 128  # what is added to an integer of a sample
_OUTPUTS, _INPUTS = 1280, 640  # of a layer that oneDNN is asked about, at most
_WIDE = 32  # rows of a linear layer that are one row of the image
_NUMBERS = 1 << 24  # of a weight that oneDNN is asked about, at most


def blocks_of(shape: Sequence[int], stride: Sequence[int]) -> Blocks | None:
    """How oneDNN wants a weight ``[O, I]`` or ``[O, I, h, w]`` of a layer of 8-bit integers; None: not in blocks, or
    there are too few numbers (``python -m benchmarks integers``)."""
    kernel = tuple(shape[2:]) or (1, 1)
    if math.prod(shape[1:]) < LEAST:
        return None
    most = _INPUTS if kernel == (1, 1) else _INPUTS // 5
    asked = math.gcd(shape[0], _OUTPUTS), math.gcd(shape[1], most)  # of so many the kernels are the same
    return wanted((*asked, *kernel), (0, 0), tuple(stride), torch.int8)


class Integers(NamedTuple):
    """Of one sample: ``numbers`` uint8, and what a number is: ``(integer - zero) * scale``."""

    numbers: Tensor
    scale: float
    zero: int


def rows_of(sample: Any) -> Integers:
    """Of a sample ``[M, K]``."""
    numbers = sample.numbers.new_empty(sample.numbers.shape, dtype=torch.uint8)
    sample.rounds(numbers)
    return Integers(numbers, sample.scale, int(sample.zero) + UNSIGNED)


def image_of(sample: Any, padding: Sequence[int]) -> Integers:
    """Of a sample ``[H, W, C]``, with a border of zeros."""
    (up, left), (height, width, channels) = padding, sample.numbers.shape
    shape, zero = (height + 2 * up, width + 2 * left, channels), int(sample.zero) + UNSIGNED
    numbers = sample.numbers.new_empty(shape, dtype=torch.uint8)
    for border in (numbers[:up], numbers[up + height :], numbers[:, :left], numbers[:, left + width :]):
        border.fill_(zero)
    sample.rounds(numbers[up : up + height, left : left + width])
    return Integers(numbers, sample.scale, zero)


class Shared:
    """Integers that several layers make of one tensor: the first one that is handed it makes them, ``last`` forgets
    them. The tensor must not change in between."""

    def __init__(self, last: nn.Module) -> None:
        self._last = weakref.ref(last)  # which has this: no circle
        self._known = threading.local()  # by a lane

    def __call__(self, layer: nn.Module, inputs: Tensor, make: Callable[[], list[Integers]]) -> list[Integers]:
        of, made = getattr(self._known, "made", (lambda: None, []))
        made = made if of() is inputs else make()
        last = layer is self._last()
        self._known.made = (lambda: None, []) if last else (weakref.ref(inputs), made)
        return made


def convolve(layer: Any, images: Iterable[Integers], results: Tensor) -> None:
    """Each image with the layer's weight into its one of ``results`` ``[N, h, w, O]``."""
    part = _Part(layer, 0, len(layer.weight))
    for image, result in zip(images, results, strict=True):
        result.copy_(part(image.numbers, part.bias(image), image.scale, result.shape[:2], result.dtype))


def multiply(layer: Any, samples: Iterable[Integers], results: Tensor, *, gates: bool = False) -> None:
    """Each sample's rows ``[M, K]`` times the layer's weight into its one of ``results`` ``[N, M, O]``; ``gates``: into
    ``[N, M, O / 2]``, the first outputs times GELU of the others."""
    outputs = len(layer.weight)
    ends = (0, outputs // 2, outputs) if gates else (0, outputs)
    parts = [_Part(layer, first, last) for first, last in pairwise(ends)]
    most = max(1, RESULTS // ends[1] // ROWS) * ROWS
    asked = (ends[1], layer.weight.shape[1])
    for sample, result in zip(samples, results, strict=True):
        biases, first = [part.bias(sample) for part in parts], 0
        for own, rows in _turns(layer.blocks, *asked, len(result), most, known=not result.is_meta):
            some, target = sample.numbers[first : first + own], result[first : first + own]
            first += own
            some = some if rows == own else torch.cat([some, some.new_zeros(rows - own, some.shape[1])])
            image = some.view(*_image(rows), -1)
            how = sample.scale, image.shape[:2], result.dtype
            made = [part(image, bias, *how).view(rows, -1)[:own] for part, bias in zip(parts, biases, strict=True)]
            if gates:
                torch.mul(made[0], torch.ops.aten.gelu.out(made[1], out=made[1]), out=target)
            else:
                target.copy_(made[0])


def _turns(
    blocks: Blocks, outputs: int, inputs: int, rows: int, most: int, *, known: bool = True
) -> Iterator[tuple[int, int]]:
    """Of ``rows`` in products of ``most`` at a time: (those of a product, those of its image, which may have more), so
    that oneDNN takes a weight ``[outputs, inputs]`` as it lies. Not ``known``: as if it always did."""
    while outputs * inputs > _NUMBERS and outputs % 2 == 0:
        outputs //= 2
    threads = torch.get_num_threads()

    def fits(size: int) -> bool:
        return not known or taken(blocks, (outputs, inputs, 1, 1), _image(size), threads)

    while rows:
        wished = min(rows, most)
        fewer = [size for size in (wished, *FEWER) if size <= wished]
        more = [size for size in reversed(FEWER) if size > wished]
        size = next(filter(fits, (*fewer, *more)), wished)
        yield min(size, rows), size
        rows -= min(size, rows)


def _image(rows: int) -> tuple[int, int]:
    """Height and width of so many rows as an image."""
    wide = _WIDE if rows % _WIDE == 0 else 1
    return rows // wide, wide


class _Part:
    """Some outputs of a layer."""

    def __init__(self, layer: Any, first: int, last: int) -> None:
        blocks, weight = layer.blocks, layer.weight[first:last]
        assert blocks is not None
        self._numbers = weight.numel()
        self._stride, self._kernel = layer.stride, tuple(weight.shape[2:]) or (1, 1)
        self._scales = layer.weight_scale[first:last].float()
        self._sums = self._scales * layer.weight_sum[first:last]
        self._bias = None if layer.bias is None else layer.bias[first:last]
        self._zeros = layer.weight_sum.new_zeros(last - first)
        if not weight.is_meta:
            self._weight = alias(weight, blocks, (*weight.shape[:2], *self._kernel))

    def bias(self, sample: Integers) -> Tensor:
        """What is added to a sample's products: the layer's own, less what its zero comes to."""
        found = self._sums * (-sample.scale * sample.zero)
        return found if self._bias is None else found.add_(self._bias)

    def __call__(self, image: Tensor, bias: Tensor, scale: float, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``[h, w, O]`` of integers ``[H, W, C]``."""
        if image.is_meta:
            count(int(2 * size[0] * size[1] * self._numbers / FASTER))
            return image.new_empty((*size, len(self._zeros)), dtype=dtype)
        convolution: Callable[..., Tensor] = torch.ops.onednn.qconv2d_pointwise
        given, weights = image.permute(2, 0, 1)[None], (self._weight, self._scales, self._zeros, bias)
        how = (self._stride, (0, 0), (1, 1), 1, 1.0, 0, dtype, "none", [], "")
        return convolution(given, scale, 0, *weights, *how)[0].permute(1, 2, 0)
