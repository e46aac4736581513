"""A block over a group of samples in micro-batches, its results gathered: the same kernels at any size of the group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from stages.memory.lanes import ALONE, Lanes


def micro_batched(
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    size: int,
    *,
    lanes: Lanes = ALONE,
    only_first: bool = False,
    whole: Callable[[int], Any] = lambda count: None,
    device: torch.device | None = None,
) -> Any:
    """``forward`` over slices of at most ``size`` samples; results are gathered in tensors made once.

    The number of samples is dimension 0 of the first tensor; every tensor with that many is sliced, also in a tuple
    (a block's skip connections) or a dict, all else (flags, sizes, a time embedding of one row) is passed on whole.
    ``only_first`` leaves all but the first slice of the result as it is: enough for a pass on the meta device.
    ``lanes`` take slices in turns.
    ``whole(count)`` may make the tensors of the result before ``forward`` runs, so that they do not come to lie among
    what that frees; None leaves it to this function. Slices go to ``device``.
    """
    given = _tensors((*args, *kwargs.values()))
    count = given[0].shape[0] if given else 0
    if count <= size:
        return mapped(laid_out, forward(*args, **kwargs))
    result = Gathered(count, whole(count))

    def run(start: int) -> None:
        stop = min(start + size, count)

        def cut(value: torch.Tensor) -> torch.Tensor:
            if len(value) != count:
                return value
            return _alone(value[start:stop]).to(device or value.device, non_blocking=True)

        own, named = mapped(cut, tuple(args)), {name: mapped(cut, value) for name, value in kwargs.items()}
        result.take(start, stop, forward(*own, **named))

    lanes.each(range(0, size if only_first else count, size), run)
    return result.whole


class Gathered:
    """The results of slices of ``count`` samples, in tensors made once; ``whole``: these, or None: as the first is."""

    def __init__(self, count: int, whole: Any) -> None:
        self.whole, self._count, self._lock = whole, count, threading.Lock()

    def take(self, start: int, stop: int, part: Any) -> None:
        """What came of samples ``start`` to ``stop``."""
        with self._lock:
            if self.whole is None:
                self.whole = mapped(lambda tensor: empty_like(tensor, self._count), part)
        for target, tensor in zip(_tensors(self.whole), _tensors(part), strict=True):
            same = target.device == tensor.device
            target[start:stop].copy_(tensor if same else laid_out(tensor), non_blocking=True)


def on_meta(result: Any) -> Any:
    """The shapes of what a block gave."""
    return mapped(lambda tensor: empty_like(tensor, tensor.shape[0], torch.device("meta")), result)


def skips(result: Any) -> list[torch.Tensor]:
    """Of what a block gave, the tensors that a later one reads: all but the first, which goes on, or the only one."""
    found = _tensors(result)
    return found if len(found) == 1 else found[1:]


def nbytes(result: Any) -> int:
    """Of the tensors in what a block gave."""
    return sum(tensor.nbytes for tensor in _tensors(result))


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, each once, but for those without dimensions."""
    found: dict[int, torch.Tensor] = {}
    mapped(lambda tensor: tensor, value, found)
    return list(found.values())


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any, known: dict[int, Any] | None = None) -> Any:
    """``value`` with ``function`` applied to its tensors, as :func:`_tensors` finds them; one twice stays one."""
    known = {} if known is None else known  # a closure that calls itself would keep them until it is collected
    if isinstance(value, tuple | list):
        return tuple([mapped(function, item, known) for item in value])
    if isinstance(value, dict):
        return {name: mapped(function, item, known) for name, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if id(value) not in known:
        known[id(value)] = function(value)
    return known[id(value)]


def _alone(part: torch.Tensor) -> torch.Tensor:
    """A sample of a sequence that was permuted, ``[1, S, D]``, with the strides that it has in a batch of its own:
    products of matrices choose their kernel by them."""
    if len(part) > 1 or part.dim() != 3 or part.is_contiguous():
        return part
    strides = part.stride()
    return part.as_strided(part.shape, (part.shape[1] * strides[1], *strides[1:]))


def read_in_one_layout(network: nn.Module) -> None:
    """Have layers read maps of one pixel, which have two equal layouts, as ``laid_out`` would give them: inside a unit
    they lie as what came before left them, at its edge as gathered, and kernels round by the one that they say."""

    def entered(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tensor = inputs[0] if inputs else None
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2] == 1:
            return laid_out(tensor), *inputs[1:]
        return None

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_pre_hook(entered)


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides that gathering gives it: later kernels choose by them how they round."""
    wanted = empty_like(tensor, tensor.shape[0], torch.device("meta")).stride()
    if tensor.stride() == wanted:
        return tensor
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):  # sides of length 1 only
        return tensor.as_strided(tensor.shape, wanted)
    return empty_like(tensor, tensor.shape[0]).copy_(tensor)


def empty_like(tensor: torch.Tensor, count: int, device: torch.device | None = None) -> torch.Tensor:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (count, *tensor.shape[1:])
    return torch.empty(shape, dtype=tensor.dtype, device=device or tensor.device, memory_format=memory_format)
