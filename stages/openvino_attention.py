"""Attention by OpenVINO's kernels, on tensors that torch holds: they use a processor's bf16 products, torch's do not.

OpenVINO makes one kernel of ``scaled_dot_product_attention``, linear in memory, where it has one for the processor and
the dtype. Else it writes products and softmax out, in memory quadratic in tokens: that is refused.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.config import ConfigError
from stages.memory.trim import drop_clean_pages

# Float32 tensors of one sample's keys that a kernel keeps, measured (``python -m benchmarks attention``): scaled
# queries, transposed and packed keys, packed values.
POOL = {torch.float32: 5, torch.bfloat16: 1}
# scores of a head between tokens and a text, at least: with fewer, what a kernel keeps is worth more than its time
CROSS = 1 << 18
# Converts models and reports over the network that it was imported, from a copy of the process: RES twice for a moment.
_LEFT_OUT = "openvino.tools.ovc"
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Shape(NamedTuple):
    """Of queries ``[1, tokens, heads, width]`` and of keys and values ``[1, keys, heads, width]``."""

    tokens: int
    keys: int
    heads: int
    width: int


class Kernels:
    """Made at the first use, each for one shape: of tokens that are not known before they take a tenth longer."""

    def __init__(self) -> None:
        self._core: Any = None
        self._known: dict[tuple[Shape, torch.dtype, int, int], Any] = {}  # by who asks, and with how many threads
        self._lock = threading.Lock()

    def request(self, shape: Shape, dtype: torch.dtype) -> Any:
        """An ``openvino.InferRequest``.

        Raises:
            ConfigError: there is no such kernel.
        """
        kind = (shape, dtype, threading.get_ident(), torch.get_num_threads())
        if kind not in self._known:
            with self._lock:
                self._known[kind] = self._made(shape, dtype)
        return self._known[kind]

    def _made(self, shape: Shape, dtype: torch.dtype) -> Any:
        self._core = self._core or _openvino().Core()
        precision = _TYPES[dtype]  # what the plugin takes by itself is bf16 for float32 too, where there is bf16
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = self._core.compile_model(
            _model(shape, precision), "CPU", {**options, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        )
        layers = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
        if "Softmax" in layers:
            expected = f"auto: OpenVINO has no kernel of attention for this processor in {precision}"
            raise ConfigError("technique.attention", "openvino", expected, "Or technique.dtype=fp32")
        drop_clean_pages()  # of the compiler
        return compiled.create_infer_request()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``[B, heads, N, width]`` each, as views of ``[B, N, heads, width]`` (others are copied); so is
        the result. A sample at a time: it takes no more memory for several."""
        query, key, value = (one.transpose(1, 2).contiguous() for one in (query, key, value))
        shape = Shape(query.shape[1], *key.shape[1:])
        result, request = torch.empty_like(query), self.request(shape, query.dtype)
        for sample in range(len(query)):
            for index, one in enumerate((query, key, value)):
                request.set_input_tensor(index, _shared(one[sample : sample + 1]))
            request.set_output_tensor(0, _shared(result[sample : sample + 1]))
            request.infer()
        return result.transpose(1, 2)


class Attending(TorchFunctionMode):
    """While it is on, self-attention is by ``kernels``, and large ones to a text; with masks they stay torch's."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _plain(*args, **kwargs):
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        if not query.is_meta:
            return self._kernels(query, key, value)
        heads, tokens, width = query.shape[1:]
        self._kernels.request(Shape(tokens, key.shape[2], heads, width), query.dtype)  # what cannot be is refused here
        pool = key.new_empty((POOL[key.dtype], *key.shape[1:]), dtype=torch.float32)
        result = func(*args, **kwargs)
        del pool
        return result


def attend_by(kernels: Kernels, modules: Sequence[nn.Module]) -> None:
    """Have the attention inside ``modules`` computed by ``kernels``."""
    for module in modules:
        module.forward = _attending(module.forward, kernels)  # type: ignore[method-assign]


def _attending(forward: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    def attending(*args: Any, **kwargs: Any) -> Any:
        with Attending(kernels):
            return forward(*args, **kwargs)

    return attending


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether a call is attention without anything else."""
    bare = attn_mask is None and not dropout_p and not is_causal and scale is None
    alike = query.dim() == 4 and query.dtype in _TYPES and key.shape == value.shape
    if not bare or not alike or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        return False
    return query.shape[2] == key.shape[2] or query.shape[2] * key.shape[2] >= CROSS


def _model(shape: Shape, precision: str) -> Any:
    """The transposes are the kernel's strides, but for one of the keys."""
    library = _openvino()
    ops, kind, inner = library.opset13, getattr(library.Type, precision), [shape.heads, shape.width]
    given = [ops.parameter([1, count, *inner], kind) for count in (shape.tokens, shape.keys, shape.keys)]
    order = ops.constant([0, 2, 1, 3])
    found = ops.scaled_dot_product_attention(*(ops.transpose(one, order) for one in given))
    return library.Model([ops.transpose(found, order)], given, "attention")


def _shared(tensor: Tensor) -> Any:
    """The same memory as an ``openvino.Tensor``."""
    library = _openvino()
    if tensor.dtype == torch.bfloat16:  # numpy knows none
        return library.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), library.Type.bf16)
    return library.Tensor(tensor.numpy(), shared_memory=True)


def _openvino() -> Any:
    """The library, which only those that attend import, without what converts models."""
    if "openvino" not in sys.modules:
        modules: dict[str, Any] = sys.modules
        modules[_LEFT_OUT] = None  # as if it were not installed
        try:
            return import_module("openvino")
        finally:
            del modules[_LEFT_OUT]
    return sys.modules["openvino"]
