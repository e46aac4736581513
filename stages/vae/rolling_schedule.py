"""When a rolling pass makes which rows of which layer, and what is alive then: from shapes alone. Nothing is computed.

Rows are made as soon as later layers can use them, and go when none needs them any more. Where a layer's strips begin
and end depends on the shapes only: begun in the middle (a killed pass, another rank) they are the same strips, and so
the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from stages.vae.exact_program import INPUT, Layer, Shape
from stages.vae.strips import source_rows

PIECE_BYTES = 16 << 20  # of a strip, as long as that is more than a row


class Step(NamedTuple):
    """Rows ``[top, bottom)`` of a layer are made; then, of each activation it reads, rows before ``low`` may go."""

    layer: Layer
    top: int
    bottom: int
    low: Mapping[str, int]


class Schedule:
    """The steps of one pass over a canvas, in order.

    Args:
        layers: from ``program``.
        found: their ``shapes``.
        itemsize: bytes of a number.
    """

    def __init__(self, layers: Sequence[Layer], found: Mapping[str, Shape], itemsize: int) -> None:
        self.layers, self.found, self.itemsize = list(layers), found, itemsize
        self._by_name = {layer.name: layer for layer in layers}
        self._readers = {name: [layer for layer in layers if name in layer.reads] for name in found}
        self._rows = {layer.name: self._piece(layer) for layer in layers}
        self.cuts: dict[str, list[int]] = {layer.name: [0] for layer in layers}
        self._cut(self.layers[-1], self._height(self.layers[-1].name))

    @property
    def last_cuts(self) -> list[int]:
        """Where strips of the last layer's result begin and end."""
        return self.cuts[self.layers[-1].name]

    def _height(self, name: str) -> int:
        return self.found[name].size.height

    def row_bytes(self, name: str) -> int:
        """Of one row of an activation; what goes in is float32."""
        channels, size = self.found[name]
        return channels * size.width * (4 if name == INPUT else self.itemsize)

    def _piece(self, layer: Layer) -> int:
        """Rows of the layer's result that are made at a time."""
        taken = {"down": 2, "same": 1, "up": 1}[layer.move] * self.row_bytes(layer.source)
        return max(1, PIECE_BYTES // max(self.row_bytes(layer.name), taken))

    def _needs(self, layer: Layer, top: int, bottom: int) -> Iterator[tuple[str, int, int]]:
        """(activation, first, last): what rows ``[top, bottom)`` are made from."""
        yield layer.source, *source_rows(layer, top, bottom, self._height(layer.source))
        if layer.residual is not None:
            yield layer.residual, top, bottom

    def _cut(self, layer: Layer, bottom: int) -> None:
        """Have the layer's strips reach ``bottom``, where a reader of them asks for it, and those before it as far."""
        cut, rows = self.cuts[layer.name], self._rows[layer.name]
        if any(reader.move == "up" for reader in self._readers[layer.name]):  # a few rows at a time: whole pieces then
            bottom = min(-(-bottom // rows) * rows, self._height(layer.name))
        while cut[-1] < bottom:
            end = min(cut[-1] + rows, bottom)
            for name, _, last in self._needs(layer, cut[-1], end):
                if name != INPUT:
                    self._cut(self._by_name[name], last)
            cut.append(end)

    def begun(self, first: int) -> dict[str, int]:
        """Where every layer begins, for the last one's row ``first``."""
        found: dict[str, int] = {}
        wanted = {self.layers[-1].name: first}
        for layer in reversed(self.layers):
            cut = self.cuts[layer.name]
            found[layer.name] = begin = cut[bisect_right(cut, wanted[layer.name]) - 1]
            for name, top, _ in self._needs(layer, begin, begin + 1):
                wanted[name] = min(top, wanted.get(name, top))
        return found

    def steps(self, first: int = 0) -> Iterator[Step]:
        """All steps from the strip of the last layer on that row ``first`` lies in."""
        made = self.begun(first)
        yield from self._reach(self.layers[-1], self._height(self.layers[-1].name), made)

    def _reach(self, layer: Layer, bottom: int, made: dict[str, int]) -> Iterator[Step]:
        cut = self.cuts[layer.name]
        while (top := made[layer.name]) < bottom:
            end = cut[bisect_right(cut, top)]
            for name, _, last in self._needs(layer, top, end):
                if name != INPUT:
                    yield from self._reach(self._by_name[name], last, made)
            made[layer.name] = end
            yield Step(layer, top, end, {name: self._low(name, made) for name in layer.reads if name != INPUT})

    def _low(self, name: str, made: Mapping[str, int]) -> int:
        """The first row of an activation that a later step reads."""
        low = self._height(name)
        for reader in self._readers[name]:
            top = made[reader.name]
            if top < self._height(reader.name):
                low = min(low, *(first for read, first, _ in self._needs(reader, top, top + 1) if read == name))
        return low

    def peaks(self) -> dict[str, int]:
        """By layer, the most bytes of activations that are alive while it runs."""
        kept: dict[str, tuple[int, int]] = dict.fromkeys(self._by_name, (0, 0))
        found, live = dict.fromkeys(self._by_name, 0), 0
        for layer, top, bottom, low in self.steps():
            low_here, _ = kept[layer.name]
            old, new = ((count - low_here) * self.row_bytes(layer.name) for count in (top, bottom))
            last = layer is self.layers[-1]
            found[layer.name] = max(found[layer.name], live + self._working(layer, top, bottom, 0 if last else new))
            if not last:
                live += new - old
                kept[layer.name] = low_here, bottom
            for name, first in low.items():
                begin, end = kept[name]
                live -= (first - begin) * self.row_bytes(name)
                kept[name] = first, end
        return found

    def _working(self, layer: Layer, top: int, bottom: int, joined: int) -> int:
        """Of one step: ``joined`` are the rows that are kept and those that are made, together."""
        rows, source = bottom - top, self.found[layer.source]
        first, last = next((a, b) for name, a, b in self._needs(layer, top, bottom) if name == layer.source)
        made = rows * self.row_bytes(layer.name)
        if layer.attention is not None:
            inner = rows * source.size.width * layer.attention.inner_dim * self.itemsize
            return max((last - first) * self.row_bytes(layer.source) + 3 * inner, made + joined)
        read = (last - first) * self.row_bytes(layer.source)
        copy = read if layer.norm is not None or layer.source == INPUT else 0
        if layer.move == "same":  # with rows of zeros where the canvas ends
            moved = read if top == 0 or bottom == self._height(layer.name) else 0
        elif layer.move == "up":
            moved = (rows + 4) * self.found[layer.name].size.width * source.channels * self.itemsize
        else:
            moved = read
        shortcut = made if layer.shortcut is not None else 0
        return max(copy + moved, (moved or copy) + made, made + shortcut, made + joined)

    def pieces(self) -> int:
        """How often the weights of a layer are used, on average over their bytes."""
        weights = {layer.name: sum(p.numel() for m in layer.owners for p in m.parameters()) for layer in self.layers}
        used = sum(len(list(pairwise(self.cuts[name]))) * count for name, count in weights.items())
        return max(1, round(used / max(1, sum(weights.values()))))


def columns(layers: Sequence[Layer], found: Mapping[str, Shape], left: int, right: int) -> tuple[int, int]:
    """(first, last) column of the input that columns ``[left, right)`` of the last layer's result depend on."""
    wanted = {layers[-1].name: (left, right)}
    for layer in reversed(layers):
        begin, end = wanted[layer.name]
        reads = [(layer.source, *source_rows(layer, begin, end, found[layer.source].size.width))]
        if layer.residual is not None:
            reads.append((layer.residual, begin, end))
        for name, first, last in reads:
            before = wanted.get(name, (first, last))
            wanted[name] = min(first, before[0]), max(last, before[1])
    return wanted[INPUT]
