"""How a model's weights are packed into one run of bytes.

One layout serves the prepared file on disk and the buffers in memory: parameters stand in the order of
``named_parameters``, each at a multiple of 64 bytes, in the compute dtype (integers in their own); 4-D weights may lie
channels-last. A unit (:mod:`stages.memory.units`) is therefore one contiguous range of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 64  # bytes: a cache line, and what oneDNN and the CUDA copy engine like


class Slot(NamedTuple):
    """Where one parameter lies in the packed bytes; ``block``: of so many outputs, side by side, and of so many inputs
    of each, where there is one (:mod:`stages.blocked`), in the place of those outputs' own bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    block: tuple[int, int] | None = None

    @property
    def integers(self) -> bool:
        return not self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, packed: torch.Tensor, base: int) -> torch.Tensor:
        """The parameter as a view of ``packed`` (uint8), whose first byte is byte ``base`` of the layout."""
        start = self.offset - base
        flat = packed[start : start + self.nbytes].view(self.dtype)
        if not self.channels_last:
            return flat.view(self.shape)
        out, channels, height, width = self.shape
        return flat.view(out, height, width, channels).permute(0, 3, 1, 2)


def owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds ``path`` (``a.b.weight``), and the last name."""
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return module, name


class Layout:
    """The packed positions of all parameters of ``model`` (which may be on the meta device)."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, channels_last: bool) -> None:
        self.dtype = dtype
        self.slots: dict[str, Slot] = {}
        end = 0
        for name, parameter in model.named_parameters():
            whole = not parameter.is_floating_point()
            last = (channels_last or whole) and parameter.dim() == 4
            block = getattr(owner(model, name)[0], "block", None) if last or (whole and parameter.dim() == 2) else None
            slot = Slot(name, end, tuple(parameter.shape), last, parameter.dtype if whole else dtype, block)
            self.slots[name] = slot
            end += -(-slot.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    @property
    def blocks(self) -> dict[str, tuple[int, int]]:
        """Of the parameters that lie in blocks: outputs and inputs of one."""
        return {name: slot.block for name, slot in self.slots.items() if slot.block}

    def range_of(self, names: Iterable[str]) -> tuple[int, int]:
        """First byte and end of the parameters ``names``, which must stand side by side."""
        slots = [self.slots[name] for name in names]
        last = max(slots, key=lambda slot: slot.offset)
        return min(slot.offset for slot in slots), last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT
