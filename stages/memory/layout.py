"""How a model's weights are packed into one run of bytes.

One layout serves the prepared file on disk and the buffers in memory: parameters stand in the order of
``named_parameters``, each at a multiple of 64 bytes, in the compute dtype; 4-D weights may lie channels-last.
A unit (:mod:`stages.memory.units`) is therefore one contiguous range of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 64  # bytes: a cache line, and what oneDNN and the CUDA copy engine like


class Slot(NamedTuple):
    """Where one parameter lies in the packed bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    channels_last: bool

    def view(self, packed: torch.Tensor, base: int, dtype: torch.dtype) -> torch.Tensor:
        """The parameter as a view of ``packed`` (uint8), whose first byte is byte ``base`` of the layout."""
        count = torch.Size(self.shape).numel()
        start = self.offset - base
        flat = packed[start : start + count * dtype.itemsize].view(dtype)
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
            last = channels_last and parameter.dim() == 4
            self.slots[name] = Slot(name, end, tuple(parameter.shape), last)
            end += -(-parameter.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def range_of(self, names: Iterable[str]) -> tuple[int, int]:
        """First byte and end of the parameters ``names``, which must stand side by side."""
        slots = [self.slots[name] for name in names]
        last = max(slots, key=lambda slot: slot.offset)
        size = torch.Size(last.shape).numel() * self.dtype.itemsize
        return min(slot.offset for slot in slots), last.offset + -(-size // ALIGNMENT) * ALIGNMENT
