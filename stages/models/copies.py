"""Copies that diffusers' blocks make and nobody needs: each is a whole activation of a tile."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _One:
    """An ``output_scale_factor`` of 1: dividing by it is no new tensor."""

    def __rtruediv__(self, divided: Tensor) -> Tensor:
        return divided

    def __eq__(self, other: object) -> bool:
        return other == 1

    def __hash__(self) -> int:
        return hash(1)


def skip_copies(model: nn.Module) -> nn.Module:
    """Let ``model``'s blocks work in fewer buffers; not one number changes.

    An activation function writes over the norm before it, or over its half of a gated layer, which nothing else reads
    (where there is a time embedding, the same function is applied to that, which others read: left alone), and a
    division by 1.0 is left out.
    """
    for module in model.modules():
        block: Any = module
        if getattr(block, "output_scale_factor", None) == 1:
            block.output_scale_factor = _One()
        for name in ("nonlinearity", "conv_act", "gate_fn"):
            act = getattr(block, name, None)
            if isinstance(act, nn.SiLU) and getattr(block, "time_emb_proj", None) is None:
                act.inplace = True
    return model
