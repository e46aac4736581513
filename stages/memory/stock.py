"""A network as its library runs it: all weights are there, or move by the library's own hooks. Nothing is streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.memory.lanes import ALONE
from stages.memory.layout import Layout, owner
from stages.memory.source import WeightSource


class StockModel:
    """A streamer (``models.loading.Streamer``) that only loads.

    Args:
        model: stock module on the meta device; buffers are real.
        layout: its packed layout, in the compute dtype.
        source: where the bytes come from.
        device: that they are loaded to; a function gives that of each by its name.
        hooked: told of the loaded model; what it returns is called at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout,
        source: WeightSource,
        device: str | Callable[[str], Any],
        hooked: Callable[[nn.Module], Callable[[], object] | None] = lambda model: None,
    ) -> None:
        self.model, self.micro_batch, self.lanes = model, 0, ALONE
        place = device if callable(device) else lambda name: device
        for slot in layout.slots.values():
            packed = torch.empty(slot.nbytes, dtype=torch.uint8)
            source.read((slot,), slot.offset, packed)
            parent, name = owner(model, slot.name)
            weight = slot.view(packed, slot.offset).to(place(slot.name))
            parent._parameters[name] = nn.Parameter(weight, requires_grad=False)
        source.close()
        for name, buffer in model.named_buffers():
            parent, last = owner(model, name)
            parent._buffers[last] = buffer.to(place(name))
        self._end = hooked(model)

    def graphed(self, call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """``call(*inputs)``, whose tensors with dimensions hold a sample a row: ``micro_batch`` of them at a time (0:
        all), which ``lanes`` take in turns."""
        count = next(value.shape[0] for value in inputs if value.dim())
        if count <= (self.micro_batch or count):
            return call(*inputs)
        found: dict[int, torch.Tensor] = {}

        def part(start: int) -> None:
            found[start] = call(*(one[start : start + self.micro_batch] if one.dim() else one for one in inputs))

        self.lanes.each(range(0, count, self.micro_batch), part)
        return torch.cat([found[start] for start in sorted(found)])

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Nothing to do: weights are there, or come by themselves."""
        yield

    def close(self) -> None:
        """Take the hooks off; the model's memory goes with it."""
        self.lanes.close()
        if self._end is not None:
            self._end()


def device_of(name: str, placement: Mapping[str, Any]) -> Any:
    """The device of a parameter: that of its module, or of the nearest around it."""
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next(placement[prefix] for prefix in around if prefix in placement)


def dispatched(placement: Mapping[str, Any], **options: Any) -> Callable[[nn.Module], None]:
    """accelerate's hooks that bring activations to where the weights of a module are.

    Args:
        placement: module -> device, of all modules.
        options: of ``accelerate.dispatch_model``.
    """

    def hook(model: nn.Module) -> None:
        from accelerate import dispatch_model

        dispatch_model(model, dict(placement), **options)

    return hook


def moved(device: str, way: str, **options: Any) -> Callable[[nn.Module], Callable[[], object] | None]:
    """The library's own hooks that bring weights from the host to ``device``.

    Args:
        way: ``model`` (the whole of it), ``sequential`` (layer by layer; both of accelerate), ``group`` (of diffusers).
        options: of ``diffusers.hooks.apply_group_offloading``.
    """

    def hook(model: nn.Module) -> Callable[[], object] | None:
        if way == "model":
            from accelerate import cpu_offload_with_hook

            _, ended = cpu_offload_with_hook(model, torch.device(device))
            hook: Any = model._hf_hook
            hook.pre_forward(model)  # calls of a part (a VAE's decoder) tell no hook
            return ended.offload
        if way == "sequential":
            from accelerate import cpu_offload

            cpu_offload(model, torch.device(device), offload_buffers=len(model._parameters) > 0)
            return None
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(model, torch.device(device), torch.device("cpu"), **options)
        return None

    return hook
