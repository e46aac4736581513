"""What the exact pass takes, known before it starts: rows of a strip, bytes in memory and on disk, multiply-adds.

A model on the meta device does. Strips are as high as ``STRIP_BYTES`` allows, whatever the budget: the picture does
not depend on it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from stages.vae.exact_program import INPUT, Layer, Shape

STRIP_BYTES = 40 << 20  # of all that is alive while a strip of a layer is made
MOMENTS = 1 << 18  # elements whose moments are taken at a time: they stay in the cache between the passes
QUERIES, KEYS = 4096, 1024  # tokens of the attention at a time


def last_use(layers: Sequence[Layer]) -> dict[str, int]:
    """The index of the last layer that reads each activation."""
    return {name: index for index, layer in enumerate(layers) for name in layer.reads}


def strip_bytes(layer: Layer, found: Mapping[str, Shape], itemsize: int, rows: int) -> int:
    """The most that is alive while ``rows`` rows of the layer's result are made, weights apart.

    Normalisation makes a second strip of the source, the convolution the target, the residual joins it in place.
    """
    source, target = found[layer.source], found[layer.name]
    if layer.attention is not None:
        return _attention_bytes(layer, source, itemsize, rows)
    assert layer.conv is not None
    halo = 2 * int(layer.conv.padding[0]) if layer.move != "down" else 0
    height = {"same": rows + halo, "up": (rows + halo) // 2 + 1, "down": 2 * rows + 1}[layer.move]
    wide = itemsize if layer.source != INPUT else itemsize + 12  # float32 from a file or, resized, from a picture
    read = min(height, source.size.height) * source.size.width * source.channels * wide
    # enlarged, or with rows of zeros where the canvas ends
    moved = read if layer.move == "same" else (height + 1) * target.size.width * source.channels * itemsize
    made = rows * target.size.width * target.channels * itemsize
    peaks = [2 * read if layer.norm is not None else read, read + moved, moved + made]
    if layer.residual is not None:
        taken = rows * target.size.width * found[layer.residual].channels * itemsize
        peaks.append(made + taken + (made if layer.shortcut is not None else 0))
    peaks.append(made + 3 * MOMENTS * 4)
    return max(peaks)


def _attention_bytes(layer: Layer, source: Shape, itemsize: int, rows: int) -> int:
    """Queries of a strip against a chunk of keys and values; sums and scores are float32."""
    inner, heads, width = layer.attention.inner_dim, layer.attention.heads, source.size.width
    queries, keys = rows * width, min(key_rows(source), source.size.height) * width
    strip = queries * source.channels * itemsize
    scores = heads * queries * keys * (4 + 2 * itemsize)
    sums = queries * inner * (4 + 4 + 2 * itemsize)
    return 3 * strip + sums + scores + 2 * keys * inner * itemsize


def key_rows(source: Shape) -> int:
    """Rows of keys and values that are read at a time."""
    return max(1, KEYS // source.size.width)


def strip_rows(layer: Layer, found: Mapping[str, Shape], itemsize: int, working_bytes: int = STRIP_BYTES) -> int:
    """Rows of the layer's result that are made at a time, one at least."""
    target = found[layer.name].size
    limit = min(target.height, max(1, QUERIES // target.width)) if layer.attention is not None else target.height
    heights = range(1, limit + 1)
    return max(1, bisect_right(heights, working_bytes, key=lambda rows: strip_bytes(layer, found, itemsize, rows)))


def working_bytes(layer: Layer, found: Mapping[str, Shape], itemsize: int) -> int:
    """The most that is alive while the layer runs, its weights apart."""
    return strip_bytes(layer, found, itemsize, strip_rows(layer, found, itemsize))


def disk_bytes(layers: Sequence[Layer], found: Mapping[str, Shape], itemsize: int) -> int:
    """The most that lies on disk at a time while the layers run: all activations that are still read, and the next.

    The attention's keys and values are counted; the last layer's result is the caller's.
    """
    last, peak = last_use(layers), 0
    for index, layer in enumerate(layers):
        live = [name for name in found if name != INPUT and last.get(name, -1) >= index]
        made = {other.name for other in layers[:index]}
        total = sum(found[name].numel for name in live if name in made)
        if index + 1 < len(layers):
            total += found[layer.name].numel
        if layer.attention is not None:
            total += 2 * found[layer.source].size.height * found[layer.source].size.width * layer.attention.inner_dim
        peak = max(peak, total * itemsize)
    return peak


def cost(layer: Layer, found: Mapping[str, Shape]) -> float:
    """Multiply-adds of a layer, for progress and predictions of time."""
    places = found[layer.name].size.height * found[layer.name].size.width
    if layer.attention is not None:
        inner = layer.attention.inner_dim
        return 4.0 * places * layer.channels * inner + 2.0 * places**2 * inner
    assert layer.conv is not None
    return float(places * layer.conv.weight.numel())
