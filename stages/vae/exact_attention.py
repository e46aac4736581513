"""The mid-block attention of a whole canvas: queries strip by strip, keys and values from disk in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.memory.rows import Rows
from stages.vae.exact_program import Shape
from stages.vae.exact_size import key_rows


def _tokens(strip: Tensor) -> Tensor:
    """``[1, C, h, W]`` to ``[h * W, C]``."""
    return strip.permute(0, 2, 3, 1).reshape(-1, strip.shape[1])


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """``[n, D]`` to ``[heads, n, D / heads]``."""
    return tokens.view(len(tokens), heads, -1).transpose(0, 1)


def attended(attention: Any, rows: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of normalised ``rows [1, C, h, W]``, projected, without residual.

    Args:
        attention: a diffusers ``Attention``.
        key, value: what is attended to, ``[1, heads, tokens, d]``.
    """
    query = _heads(attention.to_q(_tokens(rows)), attention.heads)[None]
    key, value = (part.to(query.device, query.dtype) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value)
    projected = attention.to_out[1](attention.to_out[0](mixed[0].transpose(0, 1).reshape(query.shape[2], -1)))
    return projected.view(1, *rows.shape[2:], -1).permute(0, 3, 1, 2)


class RunningAttention:
    """Attention of ``query [heads, n, d]`` over keys and values that come in chunks ``[heads, m, d]``.

    The softmax is kept as a running maximum and sum (float32), in buffers that every chunk reuses.
    """

    def __init__(self, query: Tensor) -> None:
        self.query = query
        self._top = torch.full((*query.shape[:-1], 1), float("-inf"), device=query.device)
        self._total = torch.zeros_like(self._top)
        self._mixed = torch.zeros(query.shape, device=query.device)
        self._scores: tuple[Tensor, Tensor] | None = None
        self._part = torch.empty_like(query)

    def add(self, key: Tensor, value: Tensor) -> None:
        shape = (*self.query.shape[:-1], key.shape[-2])
        if self._scores is None or self._scores[0].shape != shape:
            raw = torch.empty(shape, dtype=self.query.dtype, device=self.query.device)
            self._scores = raw, raw if raw.dtype == torch.float32 else torch.empty_like(raw, dtype=torch.float32)
        raw, scores = self._scores
        torch.matmul(self.query, key.transpose(-1, -2), out=raw)
        torch.mul(raw, self.query.shape[-1] ** -0.5, out=scores)
        higher = torch.maximum(self._top, scores.amax(-1, keepdim=True))
        scores.sub_(higher).exp_()
        fade = (self._top - higher).exp_()
        self._total.mul_(fade).add_(scores.sum(-1, keepdim=True))
        torch.matmul(scores if raw is scores else raw.copy_(scores), value, out=self._part)
        self._mixed.mul_(fade).add_(self._part)
        self._top = higher

    def result(self) -> Tensor:
        """``[heads, n, d]`` in the query's dtype."""
        return self._mixed.div_(self._total).to(self.query.dtype)


class CanvasAttention:
    """``attend(top, bottom)`` gives the projected attention of those rows, ``[1, C, h, W]``, without residual.

    Args:
        attention: a diffusers ``Attention``; its ``to_q, to_k, to_v, to_out`` are called.
        rows: gives normalised rows of the canvas, ``[1, C, h, W]``.
        shape: of the canvas.
        step: rows that are projected at a time.
        dtype: of keys and values.
        folder: keys and values lie there until the context ends.
    """

    def __init__(
        self,
        attention: Any,
        rows: Callable[[int, int], Tensor],
        shape: Shape,
        step: int,
        *,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._attention, self._rows, self._size, self._step = attention, rows, shape.size, step
        kept = (attention.inner_dim, *shape.size)
        self._stored = [Rows.scratch(folder / f"{name}.raw", kept, dtype) for name in ("keys", "values")]
        self._chunk = key_rows(shape)

    def __enter__(self) -> Callable[[int, int], Tensor]:
        for top in range(0, self._size.height, self._step):
            tokens = _tokens(self._rows(top, min(top + self._step, self._size.height)))
            for spill, project in zip(self._stored, (self._attention.to_k, self._attention.to_v), strict=True):
                spill.write(top, self._strip(project(tokens)))
        return self._attend

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole canvas, ``[1, heads, tokens, d]`` each."""
        height, heads = self._size.height, self._attention.heads
        keys, values = (_heads(_tokens(spill.read(0, height)), heads)[None] for spill in self._stored)
        return keys, values

    def __exit__(self, *_: object) -> None:
        for spill in self._stored:
            spill.remove()

    def _strip(self, tokens: Tensor) -> Tensor:
        return tokens.view(1, -1, self._size.width, tokens.shape[-1]).permute(0, 3, 1, 2)

    def _attend(self, top: int, bottom: int) -> Tensor:
        heads = self._attention.heads
        running = RunningAttention(_heads(self._attention.to_q(_tokens(self._rows(top, bottom))), heads))
        for start in range(0, self._size.height, self._chunk):
            pair = (spill.read(start, min(start + self._chunk, self._size.height)) for spill in self._stored)
            running.add(*(_heads(_tokens(part.to(running.query.device)), heads) for part in pair))
        mixed = running.result().transpose(0, 1).reshape((bottom - top) * self._size.width, -1)
        return self._strip(self._attention.to_out[1](self._attention.to_out[0](mixed)))
