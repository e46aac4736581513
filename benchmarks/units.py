"""The units of a UNet in 8-bit integers, ours beside OpenVINO's of the same layers: processor time of a guided tile.

    python -m benchmarks units                    # full-size Stable Diffusion 1.5, random weights: some minutes
    python -m benchmarks units --dtype bf16       # of what stays floats: a CPU with bf16

Ours are timed in a pass with resident weights, by one thread, with all that stands around their kernels. OpenVINO's are
compiled one by one with their weights as constants and ranges of samples known beforehand, which is the best that it
does. An engine that streamed them would make each anew from its file in every pass (``import``): OpenVINO lays weights
out again each time.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._measure import checkpoint, finish, in_stage_environment, mb, parser, table
from benchmarks._openvino_resident import PRECISIONS

REPEATS = 3


@dataclass(kw_only=True)
class Found:
    """Of one unit: seconds of both samples by the processor, what went in and came out of the first, its layers in
    integers."""

    kind: str
    ours: float = float("inf")
    given: tuple[Tensor, ...] = ()
    result: Tensor | None = None
    layers: tuple[str, ...] = ()
    openvino: float = float("inf")
    imported: float = float("inf")
    blob: int = 0
    errors: dict[str, float] = field(default_factory=dict)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--dtype", default="fp32", choices=PRECISIONS)
    options.add_argument("--side", type=int, default=64, help="latents of a tile")
    given = options.parse_args()
    folder = checkpoint(given.checkpoint, "sd15")
    return in_stage_environment(partial(measured, folder, given.dtype, given.side), "units", threads=1)


def measured(folder: Path, dtype: str, side: int) -> int:
    """In this process, by one thread."""
    library = import_module("openvino")  # all of it, before the stages take what they need
    torch.set_num_threads(1)
    units = ours(folder, dtype, side)
    theirs(library, folder, dtype, units)
    rows, sums = [], dict[str, list[float]]()
    for one in units.values():
        numbers = [1, one.ours, one.openvino, one.imported, one.blob]
        for name in (one.kind, "all"):
            sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(numbers)), numbers, strict=True)]
    for name, (count, own, openvino, imported, blob) in sums.items():
        shown = f"{own:.2f} s", f"{openvino:.2f} s", f"{own / openvino:.2f}"
        rows.append((name, int(count), *shown, f"{imported:.2f} s", mb(blob)))
    rows.append(rows.pop([row[0] for row in rows].index("all")))
    table(("units", "", "ours", "OpenVINO's", "ours over them", "import, a pass", "files"), rows)
    errors = {who: max(one.errors[who] for one in units.values()) for who in ("ours", "openvino")}
    print("largest error of a unit over what float32 gives, root mean square:", errors)
    kept = {"dtype": dtype, "side": side, "errors": errors, "by_kind": sums}
    return finish("units", kept, {"both compute the same units": max(errors.values()) < 0.1})


def ours(folder: Path, dtype: str, side: int) -> dict[str, Found]:
    """Every unit in a pass of a guided tile, the quickest of some passes."""
    from benchmarks._gpu_work import Work
    from stages.memory.units import split_units
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import open_model
    from stages.plans import ModelPlan
    from stages.techniques.attention import Attention
    from stages.techniques.dtype import TORCH
    from stages.techniques.processor import Processor
    from stages.techniques.quantize import Quantize
    from stages.tiles import Size

    kind = getattr(torch, TORCH[dtype])
    work = Work(family="sd", tile=Size(side, side), tiles=1, dtype=kind, device="cpu")
    component = Checkpoint.open(str(folder), components=(work.component,)).component(work.component)
    own = (Quantize("int8"), Processor(dtype, convolutions=True))
    own = own if dtype == "fp32" else (Attention("openvino"), *own)  # in float32 torch's is as fast
    options: dict[str, Any] = {"dtype": kind, "blocks": work.door.blocks(work.component), "micro_batch": work.passes}
    units: dict[str, Found] = {}
    with open_model(component, plan=ModelPlan(), techniques=(*work.techniques, *own), **options) as streamer:
        network, layout = streamer.model, streamer.layout  # type: ignore[attr-defined]
        for unit in split_units(network, layout, options["blocks"], layout.nbytes):
            if not unit.nested and any(True for _ in unit.module.children()):
                units[unit.name] = found = Found(kind=type(unit.module).__name__)
                found.layers = tuple(name for name, one in unit.module.named_modules() if hasattr(one, "weight_scale"))
                unit.module.forward = timed(unit.module.forward, found)
        denoiser, batch = work.denoiser(network, component.config, "cpu"), work.batch(component.config, 1)
        for _ in range(1 + REPEATS):
            denoiser(batch, torch.tensor(500.0))
    return {name: one for name, one in units.items() if one.result is not None and one.layers}


def timed(forward: Callable[..., Any], found: Found) -> Callable[..., Any]:
    """``forward``, its time and its first call's tensors noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        result = forward(*args, **kwargs)
        found.ours = min(found.ours, time.process_time() - begin)
        if found.result is None:
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            found.given = tuple(one[:1].float().contiguous() for one in tensors)
            first = result if isinstance(result, Tensor) else result[0]
            found.result = first[:1].float().contiguous()
        return result

    return call


class Called(nn.Module):
    """A block of diffusers', called as its UNet does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Tensor, *more: Tensor) -> Tensor:
        if type(self.block).__name__ != "Transformer2DModel":
            return self.block(inputs, *more)
        return self.block(inputs, encoder_hidden_states=more[0], return_dict=False)[0]


class Rounded(nn.Module):
    """A layer of integers as OpenVINO knows them: samples of a range of 256 numbers, weights with a scale an output."""

    def __init__(self, layer: Any, least: float, greatest: float) -> None:
        super().__init__()
        self.layer, (least, greatest) = layer, (min(least, 0.0), max(greatest, 0.0))
        self.scale = max(greatest - least, 1e-6) / 255
        self.zero = round(-least / self.scale)
        scales = layer.weight.flatten(1).abs().amax(1).view(-1, *[1] * (layer.weight.dim() - 1)) / 127
        self.scales = nn.Buffer(scales)
        self.integers = nn.Buffer((layer.weight / scales).round().clamp(-127, 127).to(torch.int8))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = torch.fake_quantize_per_tensor_affine(inputs, self.scale, self.zero, 0, 255)
        weight = self.integers.to(torch.float32) * self.scales
        if isinstance(self.layer, nn.Linear):
            return F.linear(inputs, weight, self.layer.bias)
        return F.conv2d(inputs, weight, self.layer.bias, self.layer.stride, self.layer.padding)


@contextmanager
def ranges(block: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, tuple[float, float]]]:
    """The ends of what goes into each layer while it is open."""
    ends: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            least, greatest = (float(end) for end in inputs[0].aminmax())
            ends[name] = least, greatest

        return note

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def theirs(library: Any, folder: Path, dtype: str, units: dict[str, Found]) -> None:
    """The same units by OpenVINO."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    core, options = library.Core(), {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    for name, one in units.items():
        block = network.get_submodule(name)
        called = Called(block)
        with ranges(block, one.layers) as ends:
            wanted = called(*one.given)
        for layer, (least, greatest) in ends.items():
            parent, _, own = layer.rpartition(".")
            setattr(block.get_submodule(parent), own, Rounded(block.get_submodule(layer), least, greatest))
        shapes = [tuple(given.shape) for given in one.given]
        model = library.convert_model(called, example_input=one.given, input=shapes)
        compiled = core.compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": PRECISIONS[dtype]})
        request, arrays = compiled.create_infer_request(), [given.numpy() for given in one.given]
        found = torch.from_numpy(next(iter(request.infer(arrays).values())).copy())
        for _ in range(REPEATS):
            begin = time.process_time()
            for _ in range(2):  # a guided tile's
                request.infer(arrays)
            one.openvino = min(one.openvino, time.process_time() - begin)
        assert one.result is not None
        one.errors = {
            who: float((made - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
            for who, made in (("ours", one.result), ("openvino", found))
        }
        blob = bytes(compiled.export_model().getvalue())
        one.blob = len(blob)
        del compiled, request
        for _ in range(REPEATS):
            begin = time.process_time()
            core.import_model(io.BytesIO(blob), "CPU", options).create_infer_request()
            one.imported = min(one.imported, time.process_time() - begin)
        print(f"{name}: ours {one.ours:.3f} s, OpenVINO's {one.openvino:.3f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
