"""Ramps where tiles and regions meet, and shares that add up to 1. numpy only, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ramp(length: int, start: float, end: float) -> np.ndarray:
    """``[length]``: 1, and rising in a line over the first ``start`` places, falling over the last ``end``."""
    place = np.arange(length) + 0.5
    weight = np.ones(length)
    if start > 0:
        weight = np.minimum(weight, place / start)
    if end > 0:
        weight = np.minimum(weight, (length - place) / end)
    return weight


def shares(spans: Sequence[tuple[int, int]], weights: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Each span's share of every place that it covers, of ``length``: what its weight is of the sum of all.

    A place covered by one span gets exactly 1, whatever its weight.

    Raises:
        ValueError: places that no span covers (never repaired: a hole is a bug of the grid).
    """
    total = np.zeros(length)
    for (start, end), weight in zip(spans, weights, strict=True):
        total[start:end] += weight
    if not (total > 0).all():
        raise ValueError(f"places {np.flatnonzero(total == 0).tolist()[:8]} of {length} are in no tile.")
    return [weight / total[start:end] for (start, end), weight in zip(spans, weights, strict=True)]
