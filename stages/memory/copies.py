"""Copies that diffusers' blocks make and nobody needs: each is a whole activation of a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.memory.units import called_inside

ROWS = 1024  # of a gated layer that go through it at a time, at least: MKL's products are the same from there on
BF16_ROWS = 384  # the same of a feed-forward in bf16, of oneDNN's products
_ASKED = 128  # outputs of a product that oneDNN is asked about
_FEED_FORWARDS = ("FeedForward", "Flux2FeedForward")
_DIVISORS = ("output_scale_factor", "rescale_output_factor")


class _One:
    """A divisor of 1: dividing by it is no new tensor."""

    def __rtruediv__(self, divided: Tensor) -> Tensor:
        return divided

    def __eq__(self, other: object) -> bool:
        return other == 1

    def __hash__(self) -> int:
        return hash(1)


class _Fresh:
    """A factor that nothing else reads: the product is written over it."""

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor

    def __rmul__(self, other: Tensor) -> Tensor:
        return self._factor.mul_(other)


class _SiLU(nn.SiLU):
    """Written over what a norm gave ``[N, C, h, w]``; a time embedding ``[N, C]``, which others read, is left alone."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, inplace=input.dim() == 4)


def _gated(gelu: Callable[[Tensor], Tensor], gate: Tensor) -> _Fresh:
    return _Fresh(gelu(gate))


def skip_copies(model: nn.Module) -> nn.Module:
    """Let ``model``'s blocks work in fewer buffers; not one number changes.

    An activation function writes over the norm before it, or over its half of a gated layer, a product over its own
    gate, and a division by 1.0 is left out.
    """
    for module in model.modules():
        block: Any = module
        for name in _DIVISORS:
            if getattr(block, name, None) == 1:
                setattr(block, name, _One())
        for name in ("nonlinearity", "conv_act", "gate_fn"):
            act = getattr(block, name, None)
            if isinstance(act, nn.SiLU) and getattr(block, "time_emb_proj", None) is None:
                act.inplace = True
            elif isinstance(act, nn.SiLU):
                setattr(block, name, _SiLU())
        if type(block).__name__ == "GEGLU" and not isinstance(block.gelu, partial):  # of a ControlNet they may be done
            block.gelu = partial(_gated, block.gelu)
    return model


def as_written(model: nn.Module) -> None:
    """Take out of ``model`` what no graph can hold of ``skip_copies``: the objects that are no tensors."""
    for module in model.modules():
        for name in _DIVISORS:
            if isinstance(getattr(module, name, None), _One):
                setattr(module, name, 1.0)
        if isinstance(vars(module).get("gelu"), partial):
            del module.gelu


def gated_in_rows(model: nn.Module) -> None:
    """Let ``model``'s gated layers take some rows at a time where there are many: what lies between their products is
    eight times as wide as a sample, and asking the system for it takes a twentieth of a UNet's time. For processors.
    """
    for module in model.modules():
        block: Any = module
        net: Any = getattr(block, "net", ())  # other networks have layers of that name that are made otherwise
        if type(block).__name__ == "FeedForward" and len(net) == 3 and type(net[0]).__name__ == "GEGLU":
            block.forward = partial(_in_rows, block, block.forward)


def _in_rows(block: Any, forward: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    gated, last = block.net[0].proj, block.net[2]
    parts = inputs.numel() // inputs.shape[-1] // ROWS
    if parts < 2 or not _plain(gated, last) or gated.bias is None or last.bias is None:
        return forward(inputs, *args, **kwargs)
    rows = inputs.reshape(-1, inputs.shape[-1]).tensor_split(parts)
    wide = inputs.new_empty(len(rows[0]), gated.out_features)
    gates, result = wide.new_empty(len(wide), last.in_features), inputs.new_empty(*inputs.shape[:-1], last.out_features)
    for some, target in zip(rows, result.view(-1, last.out_features).tensor_split(parts), strict=True):
        values, gate = torch.addmm(gated.bias, some, gated.weight.t(), out=wide[: len(some)]).chunk(2, dim=-1)
        found = torch.ops.aten.gelu.out(gate, out=gates[: len(some)]).mul_(values)
        torch.addmm(last.bias, found, last.weight.t(), out=target)
    return result


def _plain(*layers: nn.Module) -> bool:
    """Whether they are products of floats, and may be called with a part of the rows."""
    return all(type(layer) is nn.Linear for layer in layers) and called_inside(*layers)


def feed_forwards_in_rows(model: nn.Module) -> None:
    """Let ``model``'s feed-forwards in bf16 take some rows at a time where there are many: what lies between their
    products is several times as wide as a sample. For processors.
    """
    for module in model.modules():
        block: Any = module
        if type(block).__name__ in _FEED_FORWARDS:
            layers = {
                name: one for name, one in block.named_modules() if any(True for _ in one.parameters(recurse=False))
            }
            if _plain(*layers.values()) and all(
                _rows_alone(one.in_features, min(one.out_features, _ASKED)) for one in layers.values()
            ):
                block.forward = partial(_some_rows, block, tuple(layers), block.forward)


def _some_rows(
    block: nn.Module, names: Sequence[str], forward: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    parts = len(rows) // BF16_ROWS
    layers = (block.get_submodule(name) for name in names)  # others may have come in their place
    if parts < 2 or not _plain(*layers) or args or kwargs or inputs.dtype != torch.bfloat16:
        return forward(inputs, *args, **kwargs)
    found = torch.cat([forward(some[None])[0] for some in rows.tensor_split(parts)])
    return found.view(*inputs.shape[:-1], -1)


@cache
def _rows_alone(inputs: int, outputs: int) -> bool:
    """Whether this machine's products in bf16 give a row the same bits among few others as among many."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 2 * BF16_ROWS, inputs, dtype=torch.bfloat16, generator=random)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, generator=random)
    whole = F.linear(rows, weight)
    return torch.equal(torch.cat([F.linear(some, weight) for some in rows.split(BF16_ROWS, dim=1)], dim=1), whole)
