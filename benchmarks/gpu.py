"""One high-resolution step of SD 1.5 (fp16, 2048x2048 as 25 tiles with guidance) on a GPU: streamed against resident.

``python -m benchmarks.gpu [--out FILE]``: weights are random and made here. Every way runs in a process of its
own and reports seconds a step (median) and what the allocator reserved. (a) the whole canvas at once, resident; (b) a
loop over tiles, resident, at several micro-batches; (c) diffusers' group offload (leaf level, stream) over the same
tiles; and ours, weights from pinned memory or from disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stages.memory.imports import light_imports

UNET = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TILES, MB = 25, 1_000_000


def make_unet(device: str) -> Any:
    """The UNet with the same random weights in every process, on ``device``, fp16."""
    with light_imports():
        from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    unet = unet.half().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)  # of the CPU: one sequence, whatever the device
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            std = parameter[0].numel() ** -0.5
            parameter.data.normal_(0, std, generator=generator)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    made: Any = unet.eval().requires_grad_(False)
    return made.to(device)


def inputs(samples: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and embeddings for ``samples`` samples, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(1)
    image = torch.randn(samples, 4, side, side, device="cuda", dtype=torch.float16, generator=generator)
    embeds = torch.randn(samples, 77, 768, device="cuda", dtype=torch.float16, generator=generator)
    image = image.contiguous(memory_format=torch.channels_last)
    return image, torch.tensor(500.0, device="cuda"), embeds


def timed(step: Any, count: int) -> dict[str, float]:
    """Median seconds of ``count`` steps after two that warm up; bytes reserved at most."""
    for _ in range(2):
        step()
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": median(seconds), "reserved_mb": torch.cuda.max_memory_reserved() / MB}


def resident_loop(micro: int, count: int) -> tuple[dict[str, float], torch.Tensor]:
    """(b): all weights on the GPU; ``micro`` tile pairs at a time."""
    unet = make_unet("cuda").to(memory_format=torch.channels_last)
    image, timestep, embeds = inputs(2 * TILES)

    def step() -> torch.Tensor:
        return torch.cat(
            [
                unet(image[i : i + 2 * micro], timestep, embeds[i : i + 2 * micro], return_dict=False)[0]
                for i in range(0, 2 * TILES, 2 * micro)
            ]
        )

    return timed(step, count), step()


def whole_canvas(count: int) -> dict[str, float]:
    """(a): stock, one call on the 256x256 latents of the canvas."""
    unet = make_unet("cuda").to(memory_format=torch.channels_last)
    image, timestep, embeds = inputs(2, 256)
    return timed(lambda: unet(image, timestep, embeds, return_dict=False)[0], count)


def group_offload(count: int, tiles: int = 3) -> dict[str, float]:
    """(c): diffusers' group offload with a stream, one tile pair a call; scaled from ``tiles`` to 25 tiles."""
    from diffusers.hooks import apply_group_offloading

    unet = make_unet("cpu")
    apply_group_offloading(unet, torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    image, timestep, embeds = inputs(2 * tiles)

    def step() -> None:
        for i in range(0, 2 * tiles, 2):
            unet(image[i : i + 2], timestep, embeds[i : i + 2], return_dict=False)

    found = timed(step, count)
    return {**found, "seconds": found["seconds"] * TILES / tiles}


def streamed(host: str, micro: int, groups: list[int], ring: int, count: int, folder: Path, graph: bool) -> Any:
    """Ours: groups of tile pairs, each a pass, in micro-batches of ``micro`` pairs."""
    from stages.memory.layout import Layout, split_units
    from stages.memory.profile import trace
    from stages.memory.source import PreparedSource, write_prepared
    from stages.memory.stream_cuda import CudaStreamer

    torch.cuda.set_per_process_memory_fraction(800 * MB / torch.cuda.get_device_properties(0).total_memory)
    with light_imports():
        from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).half().eval().requires_grad_(False)
    layout = Layout(unet, torch.float16, channels_last=True)
    file = folder / "unet.bin"
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=folder):
            source = Made(make_unet("cpu"), layout)
            write_prepared(file, source, layout)
    largest = max(unit.nbytes for unit in split_units(unet, layout, 0))
    units = split_units(unet, layout, largest if ring < 200 * MB else layout.nbytes)

    def on_meta() -> None:
        image = torch.empty(2, 4, 64, 64, dtype=torch.float16, device="meta")
        embeds = torch.empty(2, 77, 768, dtype=torch.float16, device="meta")
        unet(image, torch.empty((), device="meta"), embeds, return_dict=False)

    order = {name: i for i, name in enumerate(dict.fromkeys(trace(unet, units, on_meta, 0).order))}
    units.sort(key=lambda unit: order[unit.name])
    small = frozenset(unit.name for unit in units if unit.nbytes < 64_000)
    begin = time.perf_counter()
    with (
        torch.inference_mode(),
        CudaStreamer(
            unet,
            layout=layout,
            units=units,
            source=PreparedSource(file, layout),
            device="cuda",
            resident=small,
            ring_bytes=ring,
            micro_batch=2 * micro,
            host=host,
        ) as streamer,
    ):
        opened = time.perf_counter() - begin
        image, timestep, embeds = inputs(2 * TILES)

        def call(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return unet(x, t, c, return_dict=False)[0]

        def step() -> torch.Tensor:
            parts, start = [], 0
            for group in groups:
                end = start + 2 * group
                x, c = image[start:end], embeds[start:end]
                part = streamer.graphed(call, x, timestep, c) if graph else call(x, timestep, c)
                parts.append(part.clone())
                start = end
            return torch.cat(parts)

        found = timed(step, count)
        return {**found, "open_seconds": opened}, step()


class Made:
    """A weight source over a model in memory, to write the prepared file from."""

    def __init__(self, model: Any, layout: Any) -> None:
        self.parameters, self.layout = dict(model.named_parameters()), layout

    def read(self, slots: Any, start: int, packed: torch.Tensor) -> None:
        for slot in slots:
            slot.view(packed, start, self.layout.dtype).copy_(self.parameters[slot.name])

    def close(self) -> None:
        self.parameters = {}


def worker(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One way, in this process; pictures of the same micro-batch are compared through files."""
    kind, count = job["kind"], job.get("count", 5)
    with torch.inference_mode():
        if kind == "whole":
            return whole_canvas(count)
        if kind == "offload":
            return group_offload(2)
        if kind == "resident":
            found, output = resident_loop(job["micro"], count)
            torch.save(output.cpu(), folder / f"resident{job['micro']}.pt")
            return found
    found, output = streamed(job["host"], job["micro"], job["groups"], job["ring"], count, folder, job["graph"])
    reference = folder / f"resident{job['micro']}.pt"
    if reference.exists():
        expected = torch.load(reference)
        found["identical"] = bool(torch.equal(expected, output.cpu()))
        found["max_difference"] = float((expected.float() - output.cpu().float()).abs().max())
    return found


DEFAULT: list[dict[str, Any]] = [
    *({"kind": "resident", "micro": micro} for micro in (1, 2, 3, 5, 9, 13, 25)),
    {"kind": "whole"},
    {"kind": "offload"},
    {"kind": "ours", "host": "pinned", "graph": True, "micro": 3, "groups": [9, 8, 8], "ring": 130 * MB},
    {"kind": "ours", "host": "pinned", "graph": True, "micro": 2, "groups": [9, 8, 8], "ring": 210 * MB},
    {"kind": "ours", "host": "pinned", "graph": True, "micro": 2, "groups": [13, 12], "ring": 130 * MB},
    {"kind": "ours", "host": "pinned", "graph": False, "micro": 3, "groups": [9, 8, 8], "ring": 130 * MB},
    {"kind": "ours", "host": "disk", "graph": False, "micro": 3, "groups": [9, 8, 8], "ring": 130 * MB},
    {"kind": "ours", "host": "disk", "graph": False, "micro": 2, "groups": [13, 12], "ring": 130 * MB},
]


def main() -> None:
    """Run every job in a process of its own, print a line each, write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/gpu.json"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gpu-benchmark")
    parser.add_argument("--jobs", help="JSON list instead of the default jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.job:
        print("RESULT " + json.dumps(worker(json.loads(arguments.job), arguments.folder)))
        return
    results = []
    for job in json.loads(arguments.jobs) if arguments.jobs else DEFAULT:
        command = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(arguments.folder), "--job", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        found = json.loads(lines[-1]) if lines else {"error": (done.stderr or done.stdout)[-1500:]}
        results.append({**job, **found})
        print(json.dumps(results[-1]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
