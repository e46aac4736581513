"""One model over several GPUs, by accelerate's device maps: which of its modules lie on which, and stay there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stages.config import ConfigError
from stages.memory.imports import light_imports
from stages.memory.stock import device_of
from stages.memory.units import Blocks
from stages.models.loading import Built

KEY = "device.max_memory"
_ALONE = ("SlicedLinear",)  # computed as one, whatever it is made of


def caps(wanted: Mapping[int, int] | int | None) -> dict[int, int]:
    """{GPU: bytes} that a model may take of each: as ``device.max_memory`` says, at most what the GPU has.

    Raises:
        ConfigError: a GPU that is not there.
    """
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    if isinstance(wanted, Mapping):
        if unknown := [index for index in wanted if index >= len(sizes)]:
            raise ConfigError(KEY, unknown[0], f"GPUs that are there: {', '.join(map(str, range(len(sizes))))}")
        return {index: min(size, sizes[index]) for index, size in sorted(wanted.items())}
    return {index: min(size, wanted or size) for index, size in enumerate(sizes)}


def placed(built: Built, way: str, limits: Mapping[int, int], room: int) -> dict[str, int]:
    """{module: GPU} of all of a network; what its family calls a block stays whole.

    Args:
        way: ``balanced`` (each GPU the same share) or ``auto`` (one GPU full before the next).
        limits: bytes of each GPU.
        room: bytes of each that stay free of weights.

    Raises:
        ConfigError: it does not fit; says by how much.
    """
    with light_imports():
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    network, dtype, whole = built.network, built.layout.dtype, unsplit(built.network, built.blocks)
    left: dict[Any, Any] = {index: size - room for index, size in limits.items() if size > room}
    options: dict[str, Any] = {"no_split_module_classes": whole, "dtype": dtype}
    shares: dict[Any, Any] = dict(left)
    if way == "balanced" and len(left) > 1:
        shares = dict(get_balanced_memory(network, dict(left), **options) or left)
    # accelerate leaves room for the largest layer on the first GPU, for one that it would bring there from a disk
    for more in (0, largest(network, whole, dtype)) if left else ():
        first = next(iter(left))
        tried = {**shares, first: shares[first] + more}
        found: dict[str, Any] = dict(infer_auto_device_map(network, tried, **options))
        held = bytes_by_gpu(built, found)
        if all(size <= left.get(index, 0) for index, size in held.items()):
            return found
    weights = built.layout.nbytes
    missing = max(weights - sum(left.values()), largest(network, whole, dtype) // 2)
    gb = {index: f"{size / 1e9:.1f}GB" for index, size in limits.items()}
    raise ConfigError(
        KEY,
        gb,
        f"room for {weights / 1e9:.1f} GB of weights of {type(network).__name__}, and for {room / 1e9:.1f} GB besides "
        "on each GPU",
        f"About {missing / 1e9:.2f} GB are missing: give more, or another GPU, or leave device.device_map out: "
        "weights are then streamed.",
    )


def unsplit(network: nn.Module, blocks: Blocks) -> list[str]:
    """Classes whose modules stay on one GPU: as the model's own class says, else its family's blocks."""
    own: Sequence[str] = getattr(network, "_no_split_modules", None) or sorted(blocks.classes | blocks.stages)
    return [*own, *sorted(blocks.stages - set(own)), *_ALONE]


def largest(network: nn.Module, whole: Sequence[str], dtype: torch.dtype) -> int:
    """Bytes of the largest module that stays on one GPU."""
    alone = (m for m in network.modules() if type(m).__name__ in whole or not any(True for _ in m.children()))
    return max(sum(p.numel() for p in module.parameters()) for module in alone) * dtype.itemsize


def bytes_by_gpu(built: Built, placement: Mapping[str, Any]) -> dict[Any, int]:
    """{device: bytes of weights that lie there}."""
    found: dict[Any, int] = {}
    for slot in built.layout.slots.values() if placement else ():
        device = device_of(slot.name, placement)
        size = slot.nbytes
        found[device] = found.get(device, 0) + size
    return found
