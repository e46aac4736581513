"""GroupNorm from its parts: statistics of groups, merged over pieces of a canvas, applied from elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_var_mean(sample: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(variance, mean) of each group of channels of ``[1, C, ...]``, ``[G]`` float32; not the unbiased variance."""
    parts = [torch.var_mean(part.float(), correction=0) for part in sample[0].chunk(groups)]
    var, mean = zip(*parts, strict=True)
    return torch.stack(var), torch.stack(mean)


def merge_var_mean(counts: Tensor, variances: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, mean) of a whole from its parts, along the first axis, float64.

    ``mean = sum w m_i`` and ``var = sum w (v_i + (m_i - mean)^2)``: with the spread between the parts, which the
    mean of their variances would miss, and without the cancellation of ``sum w m_i^2 - mean^2``.
    """
    share = (counts.double() / counts.double().sum()).view(-1, *[1] * (means.dim() - 1))
    mean = (share * means.double()).sum(0)
    return (share * (variances.double() + (means.double() - mean) ** 2)).sum(0), mean


def normalise(
    sample: Tensor, var: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm of ``[N, C, ...]`` with given statistics of G groups, in the sample's dtype, computed in float32."""
    each = sample.shape[1] // len(mean)
    mean, var = (v.to(sample.device, torch.float32).repeat_interleave(each) for v in (mean, var))
    weight, bias = (None if v is None else v.float() for v in (weight, bias))
    return F.batch_norm(sample, mean, var, weight, bias, training=False, eps=eps)
