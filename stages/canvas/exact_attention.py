"""The mid-block attention of a whole canvas: queries strip by strip, keys and values in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.canvas.exact_program import Shape
from stages.canvas.spill import Spill
from stages.canvas.tiles import Size

Strips = Callable[[], Iterator[tuple[int, Tensor]]]  # (first row, normalised strip [1, C, h, W])


def _tokens(strip: Tensor) -> Tensor:
    """``[1, C, h, W]`` to ``[h * W, C]``."""
    return strip.permute(0, 2, 3, 1).reshape(-1, strip.shape[1])


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """``[n, D]`` to ``[1, heads, n, D / heads]``."""
    return tokens.view(1, len(tokens), heads, -1).transpose(1, 2)


def attend_chunks(query: Tensor, chunks: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over keys and values that come in chunks: the softmax is kept as a running maximum and sum.

    Args:
        query: ``[1, heads, n, d]``.
        chunks: of keys and values, ``[1, heads, m, d]``.

    Returns:
        ``[1, heads, n, d]`` in the query's dtype; the running sums are float32.
    """
    scale = query.shape[-1] ** -0.5
    top = torch.full((*query.shape[:-1], 1), float("-inf"), device=query.device)
    total = torch.zeros_like(top)
    mixed = torch.zeros(query.shape, device=query.device)
    for key, value in chunks:
        scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        scores = scores.sub_(higher).exp_()
        fade = (top - higher).exp_()
        total = total.mul_(fade).add_(scores.sum(-1, keepdim=True))
        mixed = mixed.mul_(fade).add_((scores.to(value.dtype) @ value).float())
        top = higher
    return (mixed / total).to(query.dtype)


def attend_canvas(
    attention: Any,
    strips: Strips,
    size: Size,
    *,
    dtype: torch.dtype,
    folder: Path,
    working_bytes: int,
) -> Iterator[tuple[int, Tensor]]:
    """The projected attention of every strip, without residual: (first row, ``[1, C, h, W]``).

    Args:
        attention: a diffusers ``Attention``; its ``to_q, to_k, to_v, to_out`` are called.
        strips: walks the normalised canvas; called twice, the second time for the queries.
        size: of the canvas.
        dtype: of keys and values.
        folder: keys and values go there when they are larger than ``working_bytes``.
        working_bytes: what keys and values, or a block of scores, may take.
    """
    width, inner, heads = size.width, attention.inner_dim, attention.heads
    fits = 2 * size.height * width * inner * dtype.itemsize <= working_bytes
    if fits:
        yield from _in_memory(attention, strips, size, dtype)
        return
    shape = Shape(inner, size)
    stored = Spill(folder / "keys.raw", shape, dtype), Spill(folder / "values.raw", shape, dtype)
    try:
        for top, strip in strips():
            tokens = _tokens(strip)
            for spill, project in zip(stored, (attention.to_k, attention.to_v), strict=True):
                spill.put(top, project(tokens).view(1, -1, width, inner).permute(0, 3, 1, 2))
        for top, strip in strips():
            query = _heads(attention.to_q(_tokens(strip)), heads)
            # two float copies of the scores, and the chunk itself
            per_row = width * (2 * 4 * query.shape[1] * query.shape[2] + 2 * inner * dtype.itemsize)
            rows = max(1, working_bytes // per_row)

            def chunks(rows: int = rows, device: torch.device = query.device) -> Iterator[tuple[Tensor, Tensor]]:
                for start in range(0, size.height, rows):
                    pair = (s.rows(start, min(start + rows, size.height)) for s in stored)
                    key, value = (_heads(_tokens(part.to(device)), heads) for part in pair)
                    yield key, value

            yield top, _project(attention, attend_chunks(query, chunks()), strip)
    finally:
        for spill in stored:
            spill.remove()


def _in_memory(attention: Any, strips: Strips, size: Size, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    key = value = torch.empty(0)
    for top, strip in strips():
        tokens = _tokens(strip)
        if not key.numel():
            key, value = (
                torch.empty((size.height * size.width, attention.inner_dim), dtype=dtype, device=tokens.device)
                for _ in range(2)
            )
        place = slice(top * size.width, top * size.width + len(tokens))
        key[place], value[place] = attention.to_k(tokens), attention.to_v(tokens)
    keys, values = _heads(key, attention.heads), _heads(value, attention.heads)
    for top, strip in strips():
        query = _heads(attention.to_q(_tokens(strip)), attention.heads)
        yield top, _project(attention, F.scaled_dot_product_attention(query, keys, values), strip)


def _project(attention: Any, mixed: Tensor, strip: Tensor) -> Tensor:
    tokens = mixed.transpose(1, 2).reshape(strip.shape[2] * strip.shape[3], -1).to(strip.dtype)
    out = attention.to_out[1](attention.to_out[0](tokens))
    return out.view(1, *strip.shape[2:], -1).permute(0, 3, 1, 2)
