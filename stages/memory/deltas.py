"""What adapters (LoRA, LoHa, LoKr) add to weights, added as the weights are read: never a second model.

A delta is made some rows at a time, in float32, and what a weight gets is rounded once, however many deltas it has. The
same rows are made together whatever is read, so the bytes do not hang on the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.memory.layout import Slot
from stages.memory.refs import TensorRef
from stages.memory.source import WeightSource
from stages.memory.tensors import read_tensor

STEP = 1 << 20  # numbers of a weight that are made at a time


class Delta(NamedTuple):
    """What one module of a file does to one weight.

    Args:
        parts: role (:mod:`stages.techniques.lora_file`) -> where its numbers lie.
        first: the row of the delta that is the first of the weight's: modules may be joined in the file.
        scale: the strength that is asked for.
        alpha: what the file says besides its tensors, divided by the rank; None: nothing.
    """

    parts: Mapping[str, TensorRef]
    first: int
    scale: float
    alpha: float | None = None


class DeltaSource:
    """``source`` with deltas added.

    Args:
        deltas: parameter's name -> what it gets, in order.
    """

    def __init__(self, source: WeightSource, deltas: Mapping[str, Sequence[Delta]]) -> None:
        self._source, self._deltas = source, deltas

    def read(self, slots: Sequence[Slot], start: int, packed: Tensor) -> None:
        self._source.read(slots, start, packed)
        for slot in slots:
            if slot.name in self._deltas:
                add(slot.view(packed, start), self._deltas[slot.name])

    def close(self) -> None:
        self._source.close()


def add(weight: Tensor, deltas: Sequence[Delta]) -> None:
    """Add ``deltas`` to ``weight [O, ...]``, in place."""
    changes = [_Change(delta) for delta in deltas]
    rows = weight.shape[0]
    step = max(1, STEP * rows // weight.numel())
    if any(change.by_column for change in changes):
        step = rows
    for first in range(0, rows, step):
        own = weight[first : first + step]
        found = own.float()
        for change in changes:
            found = change.added(found, first)
        if found is not own:
            own.copy_(found)


class _Change:
    """A delta whose numbers have been read, float32."""

    def __init__(self, delta: Delta) -> None:
        self._parts = {role: read_tensor(ref).float() for role, ref in delta.parts.items()}
        self._first, self._scale = delta.first, delta.scale
        alpha = self._parts["alpha"].item() if "alpha" in self._parts else delta.alpha
        rank = self._rank()
        self._share = 1.0 if alpha is None or rank is None else alpha / rank
        # weight-decomposed (arXiv 2402.09353): the sum gets the magnitudes that were trained, of rows or of columns
        own = self._parts.get("dora_scale")
        self.by_column = own is not None and own.dim() > 1 and own.shape[0] == 1
        self._sizes = own if own is not None else self._parts.get("magnitude")

    def _rank(self) -> int | None:
        """None where nothing is of a low rank, and so nothing is divided."""
        for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if role in self._parts:
                return self._parts[role].shape[0]
        return None

    def added(self, weight: Tensor, first: int) -> Tensor:
        """``weight``, rows from ``first`` on, with this on top; its memory may be used."""
        first += self._first
        rows = self._rows(first, first + len(weight)).reshape(weight.shape)
        if self._sizes is None:
            return weight.add_(rows, alpha=self._scale * self._share)
        moved, sizes = weight + self._share * rows, self._sizes.flatten()
        if self.by_column:
            share = (sizes / moved.transpose(0, 1).flatten(1).norm(dim=1)).view(1, -1, *[1] * (weight.dim() - 2))
        else:
            share = sizes[first : first + len(weight)] / moved.flatten(1).norm(dim=1)
            share = share.view(-1, *[1] * (weight.dim() - 1))
        return weight + self._scale * (moved * share - weight)

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the delta, before its strength."""
        parts = self._parts
        if "diff" in parts:
            return parts["diff"][first:last]
        if "down" in parts:
            up, down = parts["up"].flatten(1)[first:last], parts["down"]
            if "mid" in parts:
                return torch.einsum("mn...,im,nj->ij...", parts["mid"], up, down.flatten(1))
            return up @ down.flatten(1)
        if "hada_w1_a" in parts:
            return self._product(1, first, last) * self._product(2, first, last)
        left, right = self._factor("lokr_w1"), self._factor("lokr_w2")
        left = left.view(*left.shape, *[1] * (right.dim() - left.dim()))
        top = first // len(right)
        made = torch.kron(left[top : -(-last // len(right))], right.contiguous())
        return made[first - top * len(right) : last - top * len(right)]

    def _product(self, number: int, first: int, last: int) -> Tensor:
        """One half of a Hadamard product (LoHa, arXiv 2108.06098)."""
        parts, name = self._parts, f"hada_w{number}"
        if f"hada_t{number}" in parts:
            core, up = parts[f"hada_t{number}"], parts[f"{name}_a"][:, first:last]
            return torch.einsum("ij...,jr,ip->pr...", core, parts[f"{name}_b"], up)
        return parts[f"{name}_a"].flatten(1)[first:last] @ parts[f"{name}_b"].flatten(1)

    def _factor(self, name: str) -> Tensor:
        """One side of a Kronecker product (LoKr), made of two or three parts where it is large."""
        parts = self._parts
        if name in parts:
            return parts[name]
        if "lokr_t2" in parts and name == "lokr_w2":
            return torch.einsum("ij...,ip,jr->pr...", parts["lokr_t2"], parts[f"{name}_a"], parts[f"{name}_b"])
        return parts[f"{name}_a"] @ parts[f"{name}_b"].flatten(1)
