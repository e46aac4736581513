"""Linear layers and convolutions in 8-bit integers, as a denoiser's are where ``technique.quantize`` says so.

Weights have a scale for each output (symmetric), samples one scale and zero point each, taken from their own range:
nothing is calibrated, and what a sample becomes depends on no other. Sums are whole numbers, so they are the same for
any threads and any size of a group. Products are ``torch._int_mm``, several times as fast as in float32 on processors
with 8-bit dot products (VNNI, AMX). A convolution is such a product too: of its windows, a few rows of them at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import int8_blocks
from stages.int8_blocks import FASTER
from stages.memory.lanes import Lanes
from stages.memory.micro import micro_batched
from stages.memory.units import called_inside

LEVELS = 253  # steps between the least and the greatest number of a sample: rounding leaves none beyond 127
NUMBERS = 1 << 18  # that a core makes at a time: what its cache holds
ROWS = 128  # of a product, at least: fewer would read its weights too often


class Int8(nn.Module):
    """A layer of such weights.

    ``weight``: int8, of the layer's shape; ``weight_scale``: a float for each output; ``weight_sum``: int32, the sum of
    each output's weights, which a zero point is multiplied by. ``samples``: they become integers too; else weights
    become floats again when the layer is called.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_sum: nn.Parameter
    stride: tuple[int, ...] = (1, 1)

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, samples: bool) -> None:
        super().__init__()
        outputs = len(layer.weight)
        self.samples = samples
        stride: tuple[int, ...] = (1, 1) if isinstance(layer, nn.Linear) else layer.stride
        self.blocks = int8_blocks.blocks_of(layer.weight.shape, stride) if samples else None
        self.block = self.blocks and (self.blocks.outputs, self.blocks.inputs)  # for the layout
        self.weight = _parameter(torch.empty(layer.weight.shape, dtype=torch.int8, device="meta"))
        self.weight_scale = _parameter(torch.empty(outputs, device="meta"))
        self.weight_sum = _parameter(torch.empty(outputs, dtype=torch.int32, device="meta"))
        self.bias = layer.bias

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers of ``dtype``."""
        return self.weight.to(dtype).mul_(self.weight_scale.to(dtype).view(-1, *[1] * (self.weight.dim() - 1)))


class Int8Linear(Int8):
    """In the place of an ``nn.Linear``."""

    def __init__(self, layer: nn.Linear, *, samples: bool) -> None:
        super().__init__(layer, samples=samples)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shared: int8_blocks.Shared | None = None

    def products(self, inputs: Tensor, result: Tensor, *, gates: bool = False) -> Tensor:
        """Of ``[N, ..., in_features]`` into ``result``; ``gates``: the first outputs times GELU of the others."""
        rows = inputs.reshape(len(inputs), -1, self.in_features)
        targets = result.view(len(rows), -1, result.shape[-1])
        if self.blocks is None:
            for sample, target in zip(rows, targets, strict=True):
                _product(self, Scaled(sample), target, gates=gates)
            return result
        integers = (int8_blocks.rows_of(Scaled(sample)) for sample in rows)
        made = self.shared(self, inputs, lambda: list(integers)) if self.shared else integers
        int8_blocks.multiply(self, made, targets, gates=gates)
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., out_features]`` of ``[N, ..., in_features]``: N samples."""
        if not self.samples:
            return F.linear(inputs, self.floats(inputs.dtype), self.bias)
        return self.products(inputs, inputs.new_empty((*inputs.shape[:-1], self.out_features)))


class Int8Conv2d(Int8):
    """In the place of an ``nn.Conv2d`` without groups or dilation; what it gives lies channels-last."""

    def __init__(self, layer: nn.Conv2d, *, samples: bool) -> None:
        super().__init__(layer, samples=samples)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        assert not isinstance(layer.padding, str)
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    @staticmethod
    def takes(layer: nn.Conv2d) -> bool:
        """Whether a convolution can be one."""
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, out_channels, h, w]`` of ``[N, in_channels, H, W]``: N samples."""
        if not self.samples:
            weight = self.floats(inputs.dtype)
            return F.conv2d(inputs, weight, self.bias, self.stride, self.padding)
        size = [
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(
                inputs.shape[2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        ]
        result = inputs.new_empty((len(inputs), *size, self.out_channels))
        samples, alone = inputs.permute(0, 2, 3, 1), self.kernel_size == self.stride == (1, 1) and not any(self.padding)
        if self.blocks and alone:
            rows = (int8_blocks.rows_of(Scaled(one.reshape(-1, self.in_channels))) for one in samples)
            int8_blocks.multiply(self, rows, result.view(len(inputs), -1, self.out_channels))
            return result.permute(0, 3, 1, 2)
        if self.blocks:
            int8_blocks.convolve(self, (int8_blocks.image_of(Scaled(one), self.padding) for one in samples), result)
            return result.permute(0, 3, 1, 2)
        for sample, target in zip(samples, result, strict=True):
            if alone:
                _product(self, Scaled(sample.reshape(-1, self.in_channels)), target.view(-1, self.out_channels))
            else:
                _product(self, Windows(sample, self), target.view(-1, self.out_channels), size[1])
        return result.permute(0, 3, 1, 2)


def one_by_one(module: nn.Module, forward: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward`` of a sample at a time: the same numbers, of activations of one sample only. Where products of
    ``module`` are units of their own, each is called once."""
    if not called_inside(*(layer for layer in module.modules() if isinstance(layer, Int8))):
        return forward(inputs, *args, **kwargs)
    return micro_batched(lambda sample: forward(sample, *args, **kwargs), (inputs,), {}, 1)


def gated(layer: Int8Linear, forward: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A GEGLU layer (``forward``) whose product is ``layer``: half of what that gives times GELU of the other half,
    while a core has both at hand. Where the product is a unit of its own, or in another dtype, as it is."""
    halves = layer.blocks is None or layer.out_features // 2 % layer.blocks.outputs == 0
    whole = halves and (layer.blocks is not None or inputs.dtype == torch.float32)
    if not whole or not called_inside(layer):
        return forward(inputs, *args, **kwargs)
    return layer.products(inputs, inputs.new_empty((*inputs.shape[:-1], layer.out_features // 2)), gates=True)


def share(attention: nn.Module) -> None:
    """Have the projections of an attention, called one after the other, make integers of what they share once."""
    layers = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
    if all(isinstance(layer, Int8Linear) and layer.blocks for layer in layers):
        shared = int8_blocks.Shared(layers[-1])  # type: ignore[arg-type]
        for layer in layers:
            layer.shared = shared  # type: ignore[union-attr]


class Scaled:
    """Numbers ``[M, K]`` of one sample, and what makes integers of them: ``number / scale + zero``, rounded."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.scale, self.zero = _range(numbers)

    def room(self, rows: int) -> Tensor:
        """For the floats of so many rows: memory that is asked for turn by turn would be new memory every time."""
        return torch.empty((rows, *self.numbers.shape[1:]), device=self.numbers.device)

    def integers(self, first: int, last: int, given: Tensor, room: Tensor) -> Tensor:
        """Rows ``first`` to ``last``, ``[last - first, K]``, in ``given``."""
        return self.rounded(first, last, given, room)

    def rounded(self, first: int, last: int, given: Tensor, room: Tensor) -> Tensor:
        """Of ``numbers``, whatever a row of them is."""
        floats, part = room[: last - first], self.numbers[first:last]
        part = floats.copy_(part) if part.dtype != floats.dtype else part
        torch.mul(part, 1 / self.scale, out=floats)
        return given.copy_(floats.add_(self.zero).round_())

    def rounds(self, given: Tensor) -> None:
        """All of ``numbers`` into ``given`` of their shape, int8, by all cores; or uint8, with ``UNSIGNED`` added.

        Torch makes signed integers of floats in a ninth of the time that unsigned ones take.
        """
        cores = torch.get_num_threads()
        turns = math.ceil(self.numbers.numel() / NUMBERS)
        turns = math.ceil(turns / cores) * cores if turns > 1 else 1  # as many for each core
        step = math.ceil(len(self.numbers) / turns)
        signed, unsigned = given.view(torch.int8), given.dtype == torch.uint8

        def worker() -> Callable[[int], None]:
            room = Scaled.room(self, step)

            def turn(first: int) -> None:
                last = min(first + step, len(self.numbers))
                Scaled.rounded(self, first, last, signed[first:last], room)
                if unsigned:
                    given[first:last].bitwise_xor_(int8_blocks.UNSIGNED)

            return turn

        _turns(range(0, len(self.numbers), step), worker, self.numbers)


class Windows(Scaled):
    """The windows of a convolution over a sample ``[H, W, C]``, each a row of K numbers; what is padded is zero."""

    def __init__(self, sample: Tensor, layer: Int8Conv2d) -> None:
        super().__init__(sample)
        height, width, channels = sample.shape
        (high, wide), (up, left) = layer.kernel_size, layer.padding
        size = (height + 2 * up, width + 2 * left, channels)
        padded = torch.full(size, int(self.zero), dtype=torch.int8, device=sample.device)
        inner = padded[up : up + height, left : left + width]
        self.rounds(inner)
        down, across = layer.stride
        rows, columns = (len(padded) - high) // down + 1, (padded.shape[1] - wide) // across + 1
        row, column, _ = padded.stride()
        # a window's numbers of one row lie side by side
        shape, strides = (rows, columns, high, wide * channels), (row * down, column * across, row, 1)
        self._windows, self._columns = padded.as_strided(shape, strides), columns

    def room(self, rows: int) -> Tensor:
        return torch.empty(0)  # they are integers already

    def integers(self, first: int, last: int, given: Tensor, room: Tensor) -> Tensor:
        windows = self._windows[first // self._columns : last // self._columns]
        given.view(windows.shape).copy_(windows)
        return given


def _product(layer: Int8, sample: Scaled, result: Tensor, whole: int = 1, *, gates: bool = False) -> None:
    """``sample`` times the layer's weights into ``result`` ``[M, O]``, some rows at a time, a multiple of ``whole``;
    ``gates``: into ``[M, O / 2]``, the first outputs times GELU of the others."""
    rows, outputs = len(result), len(layer.weight)
    weight = layer.weight.permute(0, 2, 3, 1) if layer.weight.dim() == 4 else layer.weight  # as a window lies
    weight = weight.reshape(outputs, -1).t()
    factor = layer.weight_scale.float() * sample.scale
    offset = factor * layer.weight_sum * -sample.zero
    offset = offset if layer.bias is None else offset.add_(layer.bias)
    step = min(rows, max(ROWS, NUMBERS // outputs) // whole * whole or whole)

    def multiplies() -> Callable[[int], None]:
        room = sample.room(step)
        integers = torch.empty((step, len(weight)), dtype=torch.int8, device=result.device)
        sums = torch.empty((step, outputs), dtype=torch.int32, device=result.device)
        apart = gates or result.dtype != torch.float32
        floats = torch.empty((step, outputs), device=result.device) if apart else None
        room_of_gates = torch.empty((step, outputs // 2 if gates else 0), device=result.device)

        def turn(first: int) -> None:
            last = min(first + step, rows)
            count, target = last - first, result[first:last]
            torch._int_mm(sample.integers(first, last, integers[:count], room), weight, out=sums[:count])
            made = target if floats is None else floats[:count]
            torch.addcmul(offset, made.copy_(sums[:count]), factor, out=made)
            if gates:
                values, gate = made.chunk(2, dim=-1)
                torch.mul(values, torch.ops.aten.gelu.out(gate, out=room_of_gates[:count]), out=target)
            elif floats is not None:
                target.copy_(made)

        return turn

    _turns(range(0, rows, step), multiplies, result, 2 * rows * weight.numel())


def _turns(turns: range, worker: Callable[[], Callable[[int], None]], of: Tensor, flops: int = 0) -> None:
    """All turns of a loop, each by one core: what a core has in its cache it goes on with, and no operation waits for
    another core. ``worker()``: what one of them has for itself. On the meta device, where turns are alike, one for
    each core, while ``flops`` are those of all."""
    threads = torch.get_num_threads()
    if of.is_meta:
        from stages.memory.trace import count

        count(int(flops / FASTER))
        own = [worker() for _ in range(min(threads, len(turns)))]
        own[0](turns[0])
        return
    if threads == 1 or len(turns) < threads:
        run = worker()
        for turn in turns:
            run(turn)
        return
    _cores(threads, threading.get_ident()).each(turns, *(worker() for _ in range(threads)))


@cache
def _cores(threads: int, asking: int) -> Lanes:
    """One lane for each thread of whoever asks."""
    return Lanes(threads)


def _range(numbers: Tensor) -> tuple[float, float]:
    """(scale, zero point) of a sample: its least number becomes -127. Numbers that are not finite make a scale that is
    not, so that all that comes of them is not either."""
    if numbers.is_meta:
        return 1.0, 0.0
    step = len(numbers) if numbers.is_contiguous() else max(1, 4 * NUMBERS // numbers[0].numel())  # else it is copied
    ends = [end for part in numbers.split(step) for end in part.aminmax()]
    least, greatest = (float(end) for end in torch.stack(ends).aminmax())
    least, greatest = min(least, 0.0), max(greatest, 0.0)  # zero has to be one of the numbers
    scale = (greatest - least) / LEVELS
    if not math.isfinite(scale):
        return math.nan, 0.0
    return (scale, float(round(-127 - least / scale))) if scale else (1.0, 0.0)


def quantised(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of an ``Int8`` layer of a float ``weight``, but for its bias, by name.

    ``dtype``: of the scales; integers are of the scales as rounded to it.
    """
    rows = weight.flatten(1) if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
    made = torch.empty(rows.shape, dtype=torch.int8)
    scales, sums = torch.empty(len(rows), dtype=dtype), torch.empty(len(rows), dtype=torch.int32)
    step = max(1, NUMBERS // max(rows.shape[1], 1))
    for first in range(0, len(rows), step):
        part = rows[first : first + step].float()
        scale = (part.abs().amax(1) / 127).to(dtype)
        scale[scale == 0] = 1
        own = (part / scale.float()[:, None]).round_().clamp_(-127, 127)
        made[first : first + step].copy_(own)
        scales[first : first + step], sums[first : first + step] = scale, own.sum(1)
    if weight.dim() == 4:
        out, channels, height, width = weight.shape
        return {
            "weight": made.view(out, height, width, channels).permute(0, 3, 1, 2),
            "weight_scale": scales,
            "weight_sum": sums,
        }
    return {"weight": made, "weight_scale": scales, "weight_sum": sums}


def exact() -> bool:
    """Whether products of 8-bit integers are right here: without 8-bit dot products they run over at 16 bits."""
    rows, columns = torch.full((64, 128), -128, dtype=torch.int8), torch.full((64, 128), 127, dtype=torch.int8)
    return bool((torch._int_mm(rows, columns.t()) == -128 * 127 * 128).all())


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
