"""Convolutions whose weights lie as oneDNN computes with them.

It wants the numbers of some outputs side by side (``Acdb32a``: of 32; in bf16 ``Acdb32a2b``: of pairs of inputs), and
lays a weight out so in every call of torch's convolution: up to a tenth of the time of a UNet with two samples, and as
many bytes more as the weight has. Here they lie so from the file on. The kernels are the same, and so is every bit of
what they give.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.memory.layout import Slot
from stages.memory.source import WeightSource
from stages.memory.trace import count
from stages.memory.trim import torch_library

_PRIME = 251  # different integers of 8 bits
_INPUTS, _SIDE = 128, 16  # of a convolution that oneDNN is asked about: what it wants depends on the outputs
_WIDE = 34  # the same for integers, which are padded before: they are wanted otherwise where there are few
# Where a description has its numbers, of 8 bytes each (``dnnl_memory_desc``): ``_wanted`` holds what is written there
# against oneDNN's own.
_DIMS, _PADDED, _STRIDES, _DEPTH, _BLOCK, _WHICH, _WORD = 8, 112, 320, 416, 424, 520, 8
_TYPES, _MKLDNN = {torch.float32: 6, torch.bfloat16: 15, torch.int8: 1}, 3  # torch's numbers of dtypes and a layout
_OPS = ("_convolution_pointwise", "_reorder_convolution_weight", "_nbytes", "_get_mkldnn_serialized_md", "data_ptr")


class Blocks(NamedTuple):
    """How a weight lies: numbers of ``outputs`` outputs side by side, of ``inputs`` inputs each, and oneDNN's
    description of all of it."""

    outputs: int
    inputs: int
    described: bytes


def lay_out(conv: nn.Conv2d, dtype: torch.dtype = torch.float32) -> None:
    """Let ``conv`` take its weight, in ``dtype``, as oneDNN wants it on this machine; else it is left alone.

    ``conv.block`` then says how (:class:`stages.memory.layout.Slot`).
    """
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or dtype not in _TYPES or _made() is None:
        return
    kernel: tuple[int, ...] = conv.kernel_size
    padding: tuple[int, ...] = (*conv.padding,)
    inputs = min(conv.in_channels, _INPUTS) if math.prod(kernel) > 1 else conv.in_channels
    asked = (conv.out_channels, inputs, *kernel)
    blocks = wanted(asked, padding, (*conv.stride,), dtype)
    if blocks is None or conv.in_channels % blocks.inputs:
        return
    shape = (conv.out_channels, conv.in_channels, *kernel)
    described = _described(blocks, shape)

    def convolved(inputs: Tensor) -> Tensor:
        if inputs.is_meta:  # what comes in lies channels-last, though some kernels of that device forget it
            return _on_meta(conv, inputs, padding)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return _convolved(inputs, conv.weight, described, conv.bias, padding, conv.stride)

    conv.block = blocks.outputs, blocks.inputs  # type: ignore[assignment]
    conv.forward = convolved  # type: ignore[method-assign]


def blocked(weight: Tensor, outputs: int, inputs: int = 1) -> Tensor:
    """The numbers of a weight ``[O, I, h, w]`` in the order of blocks: ``[O / outputs, h, w, I / inputs, outputs,
    inputs]``."""
    return weight.unflatten(1, (-1, inputs)).unflatten(0, (-1, outputs)).permute(0, 4, 5, 2, 1, 3)


class BlockedSource:
    """Weights in blocks, of a source of weights that lie channels-last: some outputs' bytes stay where they are."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def read(self, slots: Sequence[Slot], start: int, packed: Tensor) -> None:
        self._source.read(slots, start, packed)
        for slot in slots:
            if slot.block:
                weight = slot.view(packed, start)
                for part in (weight if weight.dim() == 4 else weight[..., None, None]).split(slot.block[0]):
                    flat = part.permute(0, 2, 3, 1).view(-1)
                    flat.copy_(blocked(part, *slot.block).flatten())

    def close(self) -> None:
        self._source.close()


def _on_meta(conv: nn.Conv2d, inputs: Tensor, padding: Sequence[int]) -> Tensor:
    """Of the result's shape; it needs nothing besides."""
    sides = [
        (side + 2 * pad - kernel) // stride + 1
        for side, pad, kernel, stride in zip(inputs.shape[2:], padding, conv.kernel_size, conv.stride, strict=True)
    ]
    count(2 * len(inputs) * math.prod(sides) * conv.weight.numel())
    return inputs.new_empty((len(inputs), *sides, conv.out_channels)).permute(0, 3, 1, 2)


@cache
def wanted(
    shape: tuple[int, ...], padding: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Blocks | None:
    """How oneDNN wants a weight; None where not in blocks that hold as many bytes, or where this torch does not take
    such a weight and give the same bits of it: what does so is not public."""
    try:
        return _asked(shape, padding, stride, dtype)
    except (AttributeError, RuntimeError, TypeError):
        return None


@cache
def taken(blocks: Blocks, shape: tuple[int, ...], image: tuple[int, int], threads: int) -> bool:
    """Whether oneDNN takes a weight of integers ``shape`` ``[O, I, 1, 1]`` as it lies in ``blocks`` for samples of
    ``image`` ``[h, w]``, ``threads`` of which compute; else it lays it out anew in every call, in thirty times what the
    product takes. What it wants depends on the number of rows: where there are few, and for some among the many."""
    weight = torch.empty(shape, dtype=torch.int8)  # whatever is there: pages that nothing wrote to take no memory
    sample = [1, shape[1], *image]
    with torch.no_grad():
        made = torch.ops.onednn.qconv_prepack(weight, torch.ones(shape[0]), 1.0, 0, (1, 1), (0, 0), [1, 1], 1, sample)
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(made).tolist()) == _described(blocks, shape)


def _asked(
    shape: tuple[int, ...], padding: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Blocks | None:
    outputs, inputs, high, wide = shape
    numbers = _different(math.prod(shape), dtype)
    weight = numbers.view(outputs, high, wide, inputs).permute(0, 3, 1, 2)
    ops, size, once = torch.ops.mkldnn, [2, inputs, _SIDE, _SIDE], ([1, 1], 1)
    padded = [1, inputs, _WIDE, _WIDE]
    with torch.no_grad():
        if dtype == torch.int8:
            made = torch.ops.onednn.qconv_prepack(weight, torch.ones(outputs), 1.0, 0, stride, padding, *once, padded)
        else:
            made = ops._reorder_convolution_weight(weight, padding, stride, *once, size)
    nbytes, described = ops._nbytes(made), bytes(ops._get_mkldnn_serialized_md(made).tolist())
    block, inner = (int.from_bytes(described[at : at + _WORD], "little") for at in (_BLOCK, _BLOCK + _WORD))
    depth, which = (int.from_bytes(described[at : at + 4], "little") for at in (_DEPTH, _WHICH + _WORD))
    pairs = depth == 2 and which == 1  # of inputs, inside of blocks of outputs
    inner = inner if pairs else 1
    if nbytes != weight.nbytes or depth > 1 + pairs or not block or outputs % block or inputs % inner:
        return None
    found = Blocks(block, inner, described)
    laid = blocked(weight, block, inner).flatten().view(torch.uint8)
    own = ctypes.string_at(ops.data_ptr(made), nbytes) == laid.numpy().tobytes()
    if not own or _described(found, shape) != described:
        return None
    if dtype == torch.int8:
        return found if _same_sums(found, weight, padding, stride) else None
    usual = torch.linspace(-1, 1, numbers.numel()).to(dtype).view_as(weight)
    return found if _same_bits(found, usual, padding, stride) else None


def _different(count: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers of which neighbours differ."""
    if dtype == torch.float32:
        return torch.arange(count, dtype=dtype)
    if dtype == torch.int8:
        return (torch.arange(count) % _PRIME - _PRIME // 2).to(dtype)
    return (torch.arange(count) % torch.tensor(math.inf, dtype=dtype).view(torch.int16)).to(torch.int16).view(dtype)


def _same_sums(blocks: Blocks, weight: Tensor, padding: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether sums of products with integers in blocks are exact."""
    shape = (1, weight.shape[1], _WIDE, _WIDE)
    inputs = (torch.arange(math.prod(shape)) % (_PRIME + 1)).to(torch.uint8).view(shape)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    laid = blocked(weight, blocks.outputs, blocks.inputs).contiguous().view(weight.shape)
    how = (stride, padding, (1, 1), 1, 1.0, 0, torch.float32, "none", [], "")
    given = (alias(laid, blocks, weight.shape), scales, zeros, None)
    found = torch.ops.onednn.qconv2d_pointwise(inputs, 1.0, 0, *given, *how)
    return torch.equal(found, nn.functional.conv2d(inputs.double(), weight.double(), None, stride, padding).float())


def _same_bits(blocks: Blocks, weight: Tensor, padding: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether what comes of a weight in blocks is what comes of the plain one."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    inputs = torch.linspace(-1, 1, 2 * weight.shape[1] * _SIDE**2).view(2, weight.shape[1], _SIDE, _SIDE)
    inputs = inputs.to(weight.dtype).contiguous(memory_format=torch.channels_last)
    laid = torch.empty_like(weight)
    laid.permute(0, 2, 3, 1).view(-1).copy_(blocked(weight, blocks.outputs, blocks.inputs).flatten())
    found = _convolved(inputs, laid, blocks.described, None, padding, stride)
    return torch.equal(found, nn.functional.conv2d(inputs, weight, None, stride, padding))


def _convolved(
    inputs: Tensor,
    weight: Tensor,
    described: bytes,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    pads = (padding, stride, (1, 1), 1, "none", [], "")
    return torch.ops.mkldnn._convolution_pointwise(inputs, _alias(weight, described), bias, *pads)


def alias(weight: Tensor, blocks: Blocks, shape: Sequence[int]) -> Tensor:
    """The memory of a weight that lies in ``blocks`` as oneDNN's tensor of ``shape``; valid as long as that is."""
    return _alias(weight, _described(blocks, shape), shape)


def _described(blocks: Blocks, shape: Sequence[int]) -> bytes:
    """The description of a weight of another shape that lies in such blocks."""
    _, inputs, high, wide = shape
    found, row = bytearray(blocks.described), inputs * blocks.outputs
    strides = (high * wide * row, blocks.outputs * blocks.inputs, wide * row, row)
    for begin, numbers in ((_DIMS, shape), (_PADDED, shape), (_STRIDES, strides)):
        for index, number in enumerate(numbers):
            found[begin + _WORD * index : begin + _WORD * (index + 1)] = int(number).to_bytes(_WORD, "little")
    return bytes(found)


@cache
def _made() -> Callable[..., int] | None:
    """What makes a tensor of memory and a description, where torch has it and oneDNN."""
    library = torch_library()
    if library is None or not torch.backends.mkldnn.is_available():
        return None
    found = getattr(library, "aoti_torch_create_tensor_from_blob_v2", None)
    return found if all(hasattr(torch.ops.mkldnn, name) for name in _OPS) and hasattr(torch._C, "_aoti") else None


def _alias(weight: Tensor, described: bytes, shape: Sequence[int] | None = None) -> Tensor:
    """The memory of ``weight`` as a tensor of oneDNN's; it is valid as long as that is."""
    shape = weight.shape if shape is None else shape
    strides = torch.empty(shape, device="meta").stride()
    make, capsule = _made(), ctypes.pythonapi.PyCapsule_New
    assert make is not None
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    numbers, made = ctypes.c_int64 * 4, ctypes.c_void_p()
    code = make(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(4),
        numbers(*shape),
        numbers(*strides),
        ctypes.c_int64(0),
        ctypes.c_int32(_TYPES[weight.dtype]),
        ctypes.c_int32(0),
        ctypes.c_int32(0),
        ctypes.byref(made),
        ctypes.c_int32(_MKLDNN),
        described,
        ctypes.c_int64(len(described)),
    )
    if code:
        raise RuntimeError(f"torch made no tensor of a weight of shape {tuple(weight.shape)} (code {code})")
    own: Any = torch._C  # what takes a single tensor copies it, and its original is never freed (torch 2.13)
    (found,) = own._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule(made.value, None, None)])
    return found
