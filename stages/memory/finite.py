"""Numbers that are not finite, or absurd, end a stage before they become a picture."""

from __future__ import annotations

import torch
from torch import Tensor

ABSURD = 1000.0  # of latents: a picture's are within about 10, whatever the model
_REMEDY = (
    "Try technique.dtype=fp32 (fp16 overflows first, then bf16), another checkpoint, or other options of the scheduler."
)


def refuse_not_finite(values: Tensor, what: str) -> None:
    """ValueError if ``values`` (any shape, floating) has NaN or an infinity; ``what``: of which step or tile."""
    if bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all()):
        return  # a sum is a third of the work, but may overflow by itself
    bad = int((~torch.isfinite(values)).sum())
    raise ValueError(f"{what}: {bad} of {values.numel()} numbers are NaN or infinite. {_REMEDY}")


def refuse_absurd(latents: Tensor, what: str) -> None:
    """``refuse_not_finite``, and ValueError for latents that can be no picture's."""
    refuse_not_finite(latents, what)
    most = float(latents.abs().max())
    if most > ABSURD:
        raise ValueError(f"{what}: latents reach {most:.3g}, a picture's stay within about 10. {_REMEDY}")
