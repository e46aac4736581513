"""Copies that diffusers' blocks make and nobody needs: each is a whole activation of a tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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
