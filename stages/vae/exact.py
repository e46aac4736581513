"""The VAE of a whole canvas, exactly, in the memory of a strip.

Layer by layer over row strips that are spilled to disk: every GroupNorm has the statistics of the whole canvas (merged
from the strips'), and the mid-block attention sees all of it. Equal to the whole-image pass up to rounding. Weights,
activations and projections are the stock model's own; only the order of the work differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.files import digest, read_json, write_json
from stages.memory.rows import Rows
from stages.vae.exact_attention import CanvasAttention
from stages.vae.exact_program import INPUT, Layer, Shape, shapes
from stages.vae.exact_size import MOMENTS, STRIP_BYTES, cost, last_use, strip_rows
from stages.vae.groupnorm import merge_var_mean
from stages.vae.strips import convolved, finished, prepared, source_rows

Hold = Callable[[nn.Module], AbstractContextManager[Any]]
STATE = "state.json"
Read = Callable[[int, int], Tensor]  # rows [top, bottom) of an activation, [1, C, h, W]
Take = Callable[[int, Tensor], None]  # the first row of a strip, and the strip


def _boot_id() -> str:
    """Scratch files are not synced to disk, so they count only until the machine starts anew."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def layers_done(folder: Path) -> int:
    """How many layers an earlier pass in ``folder`` says it finished (whether they can be used is checked later)."""
    state = read_json(folder / STATE)
    return len(state["done"]) if state and state["boot"] == _boot_id() else 0


def channel_moments(strip: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, mean) of each channel of ``[1, C, h, W]``, float64 on the CPU."""
    flat = strip.permute(0, 2, 3, 1).reshape(-1, strip.shape[1])
    parts = []
    for part in flat.split(max(1, MOMENTS // strip.shape[1])):
        values = part.float()
        mean = values.mean(0)
        parts.append((len(part), values.sub_(mean).square_().mean(0).cpu(), mean.cpu()))
    counts, variances, means = zip(*parts, strict=True)
    return merge_var_mean(torch.tensor(counts), torch.stack(variances), torch.stack(means))


class ExactPass:
    """One pass of a program of layers over a canvas.

    Args:
        layers: from ``program``.
        given: shape of the input.
        folder: for the activations and the state; an earlier, killed pass in it is gone on with, layer by layer.
        dtype: of the model's weights and activations.
        device: where the strips are computed.
        working_bytes: what a layer's strips may take, weights apart; the result depends on it by rounding only.
        hold: keeps a module's weights in memory while a layer's strips run through it.
        mark: told the name of the layer that runs.
        advance: told the share of all work that is done, 0 to 1.
        keys: told the name of an attention, its keys and its values, ``[1, heads, tokens, d]``; of small canvases.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        given: Shape,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        working_bytes: int = STRIP_BYTES,
        hold: Hold = nullcontext,
        mark: Callable[[str], None] = lambda name: None,
        advance: Callable[[float], None] = lambda share: None,
        keys: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.layers, self.folder, self.dtype, self.device = list(layers), folder, dtype, torch.device(device)
        self.working_bytes, self.hold, self.mark, self.advance = working_bytes, hold, mark, advance
        self._keys = keys
        self.shapes, self._last = shapes(self.layers, given), last_use(self.layers)
        self._costs = [cost(layer, self.shapes) for layer in self.layers]
        self._done_cost = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._spills: dict[str, Rows] = {}
        self._digests: dict[str, str] = {}
        self.resumed_from = self._load()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def _file(self, name: str) -> Rows:
        return Rows.scratch(self._path(name), self.shapes[name].axes, self.dtype)

    def _load(self) -> int:
        """The number of layers that an earlier pass finished and whose activations are all there."""
        state = read_json(self.folder / STATE)
        names = [layer.name for layer in self.layers]
        done = len(state["done"]) if state and state["boot"] == _boot_id() and state["dtype"] == str(self.dtype) else 0
        if done and state["done"] == names[:done] and state["input"] == list(self.shapes[INPUT].size):
            wanted = [name for name in names[:done] if self._last.get(name, -1) >= done]
            nbytes = {name: self.shapes[name].numel * self.dtype.itemsize for name in wanted}
            kept = state.get("sha256", {})
            if all(self._intact(name, nbytes[name], kept.get(name)) for name in wanted):
                self._digests = {name: kept[name] for name in wanted}
                for name in wanted:
                    self._spills[name] = self._file(name)
                    var, mean = (torch.tensor(values, dtype=torch.float64) for values in state["moments"][name])
                    self._moments[name] = (var, mean)
                return done
        for path in self.folder.glob("*.raw"):
            path.unlink()
        return 0

    def _intact(self, name: str, nbytes: int, expected: str | None) -> bool:
        path = self._path(name)
        return path.is_file() and path.stat().st_size == nbytes and digest(path) == expected

    def _save(self, done: int) -> None:
        kept = [layer.name for layer in self.layers[:done] if self._last.get(layer.name, -1) >= done]
        state = {
            "boot": _boot_id(),
            "dtype": str(self.dtype),
            "input": list(self.shapes[INPUT].size),
            "done": [layer.name for layer in self.layers[:done]],
            "sha256": {name: self._digests[name] for name in kept},
            "moments": {name: [values.tolist() for values in self._moments[name]] for name in kept},
        }
        write_json(self.folder / STATE, state)
        for name in set(self._spills) - set(kept):
            self._spills.pop(name).remove()

    @torch.no_grad()
    def run(self, source: Callable[[int, int], Tensor], sink: Callable[[int, Tensor], None]) -> None:
        """Run the layers that are not done.

        Args:
            source: gives rows ``[top, bottom)`` of the input, ``[1, C, h, W]``.
            sink: takes the last layer's rows: first row, ``[1, C, h, W]`` in the pass' dtype.
        """
        self._done_cost = sum(self._costs[: self.resumed_from])
        for index, layer in enumerate(self.layers[self.resumed_from :], self.resumed_from):
            self.mark(layer.name)
            final = index + 1 == len(self.layers)
            with ExitStack() as held:
                for owner in layer.owners:
                    held.enter_context(self.hold(owner))
                if final:
                    self._make(layer, source, sink)
                else:
                    self._spill(layer, source)
            self._done_cost += self._costs[index]
            self.advance(self._done_cost / sum(self._costs))
            if not final:
                self._save(index + 1)

    def clear(self) -> None:
        """Remove the scratch files; call it when the result is safe."""
        (self.folder / STATE).unlink(missing_ok=True)
        for spill in self._spills.values():
            spill.remove()
        self._spills.clear()

    def _spill(self, layer: Layer, source: Read) -> None:
        target = self._file(layer.name)
        parts = []

        def take(top: int, strip: Tensor) -> None:
            target.write(top, strip)
            parts.append((strip.shape[2], *channel_moments(strip)))

        self._make(layer, source, take)
        rows, variances, means = zip(*parts, strict=True)
        self._moments[layer.name] = merge_var_mean(torch.tensor(rows), torch.stack(variances), torch.stack(means))
        self._spills[layer.name], self._digests[layer.name] = target, digest(target.path)

    def _make(self, layer: Layer, source: Read, take: Take) -> None:
        """The layer's result, strip by strip; a strip is nowhere kept while the next is made."""
        height, share = self.shapes[layer.name].size.height, self._costs[self.layers.index(layer)] / sum(self._costs)
        before = self._done_cost / sum(self._costs)
        read = source if layer.source == INPUT else self._spills[layer.source].read
        step = strip_rows(layer, self.shapes, self.dtype.itemsize, self.working_bytes)
        attend = None
        with ExitStack() as scratch:
            if layer.attention is not None:
                rows_of = partial(self._prepared, layer, read)
                shape = self.shapes[layer.source]
                canvas = CanvasAttention(layer.attention, rows_of, shape, step, dtype=self.dtype, folder=self.folder)
                attend = scratch.enter_context(canvas)
                if self._keys is not None:
                    self._keys(layer.name, *canvas.pair())
            for top in range(0, height, step):
                bottom = min(top + step, height)
                if attend:
                    made = attend(top, bottom)
                else:
                    full = self.shapes[layer.source].size.height
                    rows = self._prepared(layer, read, *source_rows(layer, top, bottom, full))
                    made = convolved(layer, rows, top, bottom, full)
                    del rows
                residual = None
                if layer.residual is not None:
                    residual = self._spills[layer.residual].read(top, bottom).to(self.device)
                take(top, finished(layer, made, residual))
                del made, residual
                self.advance(before + share * bottom / height)

    def _prepared(self, layer: Layer, read: Read, top: int, bottom: int) -> Tensor:
        moments = self.group_moments(layer) if layer.norm is not None else None
        return prepared(layer, read(top, bottom).to(self.device, self.dtype), moments)

    def group_moments(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """What a layer's norm uses: of the canvas, from its channels. The same merge, since groups are of one size."""
        assert layer.norm is not None
        var, mean = (values.view(layer.norm.num_groups, -1).T for values in self._moments[layer.source])
        return merge_var_mean(torch.ones(len(var)), var, mean)
