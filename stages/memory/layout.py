"""How a model's weights are packed into one run of bytes, and the units that are loaded together.

One layout serves the prepared file on disk and the buffers in memory: parameters stand in the order of
``named_parameters``, each at a multiple of 64 bytes, in the compute dtype; 4-D weights may lie channels-last.
A unit (a resnet, a transformer block, a sampler, or a leaf) is therefore one contiguous range of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 64  # bytes: a cache line, and what oneDNN and the CUDA copy engine like

# Modules that are loaded whole when they fit: every one is called once per pass, with the batch in dimension 0 of
# its tensors and no sample depending on another, so that it can run in micro-batches.
BLOCK_CLASSES = frozenset(
    {
        "ResnetBlock2D",
        "Transformer2DModel",
        "BasicTransformerBlock",
        "Downsample2D",
        "Upsample2D",
        "Attention",
        "FeedForward",
        "CLIPEncoderLayer",
    }
)
# Several of these with the skip connections between them: whole where they are small and their activations large.
STAGE_CLASSES = frozenset({"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"})


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


@dataclass(kw_only=True, eq=False)
class Unit:
    """A module whose weights are loaded and dropped together."""

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    start: int  # bytes in the layout
    end: int
    nested: bool = False  # its children are units of their own: it stays in memory

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def parkable(model: nn.Module, units: Iterable[Unit]) -> tuple[str, ...]:
    """Units of a UNet that give its longest skip connections, where both ends are units: nothing between needs them."""
    names, stages = {unit.name for unit in units}, getattr(model, "up_blocks", ())
    ends = ("conv_in", "down_blocks.0", f"up_blocks.{len(stages) - 1}")
    return ends[:2] if stages and names.issuperset(ends) else ()


def split_units(model: nn.Module, layout: Layout, limit: int, stage_limit: int = 0) -> list[Unit]:
    """Cut ``model`` into units of at most ``limit`` bytes where its block structure allows it.

    A stage of a UNet of at most ``stage_limit`` bytes is one unit: what it joins and splits inside then has the size of
    a micro-batch, not of the group.

    A leaf larger than the limit stays one unit (the planner then says what budget it needs). Parameters that a
    module owns directly beside children (embeddings of some encoders) become a unit of that module alone,
    and those of a module with children must not stand between its children's.
    """

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, list[str]]]:
        names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        if not names:
            return
        leaf = not any(True for _ in module.children())
        start, end = layout.range_of(names)
        kind, size = type(module).__name__, end - start
        whole = (kind in BLOCK_CLASSES and size <= limit) or (kind in STAGE_CLASSES and size <= stage_limit)
        if leaf or whole:
            yield prefix.rstrip("."), module, names
            return
        own = [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
        if own:
            yield prefix.rstrip("."), module, own
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    units = []
    for name, module, names in walk(model, ""):
        start, end = layout.range_of(names)
        slots = tuple(layout.slots[n] for n in names)
        nested = len(names) < sum(1 for _ in module.parameters())
        units.append(Unit(name=name, module=module, slots=slots, start=start, end=end, nested=nested))
    return units
