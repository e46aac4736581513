"""The ways that ``benchmarks.gpu`` compares, each in a process of its own: ``python -m benchmarks._gpu_ways JOB``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stages.memory.imports import light_imports

TILES, MB = 25, 1_000_000


def stock(folder: Path, device: str) -> Any:
    """The UNet as diffusers loads it, fp16."""
    with light_imports():
        from diffusers import UNet2DConditionModel
    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float16)
    return unet.eval().requires_grad_(False).to(device)


def inputs(samples: int, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and embeddings for ``samples`` samples, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(1)
    image = torch.randn(samples, 4, side, side, device="cuda", dtype=torch.float16, generator=generator)
    embeds = torch.randn(samples, 77, 768, device="cuda", dtype=torch.float16, generator=generator)
    image = image.contiguous(memory_format=torch.channels_last)
    return image, torch.tensor(500.0, device="cuda"), embeds


def timed(step: Callable[[], Any], count: int) -> dict[str, Any]:
    """Median seconds of ``count`` steps after two that warm up; what the allocator reserved and gave out at most."""
    begin = time.perf_counter()
    for _ in range(2):
        step()
        torch.cuda.synchronize()
    warm, seconds = time.perf_counter() - begin, []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": round(median(seconds), 4),
        "spread": [round(min(seconds), 4), round(max(seconds), 4)],
        "reserved_mb": round(torch.cuda.max_memory_reserved() / MB, 1),
        "allocated_mb": round(torch.cuda.max_memory_allocated() / MB, 1),
        "warm_up_seconds": round(warm, 2),
    }


def fresh() -> None:
    """As if nothing had run here."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def resident(job: dict[str, Any]) -> list[dict[str, Any]]:
    """(b) a loop over tiles, ``micros`` pairs at a time, and (a) the whole canvas in one call; weights stay there."""
    unet = stock(Path(job["checkpoint"]), "cuda").to(memory_format=torch.channels_last)
    image, timestep, embeds = inputs(2 * TILES)
    found = []
    for micro in job["micros"]:
        fresh()

        def step(size: int = 2 * micro) -> Tensor:
            parts = zip(image.split(size), embeds.split(size), strict=True)
            return torch.cat([unet(part, timestep, text, return_dict=False)[0] for part, text in parts])

        found.append({"micro": micro, **timed(step, job["count"])})
        if job["keep"]:
            torch.save(step().cpu(), Path(job["folder"]) / f"resident{micro}.pt")
        print(json.dumps(found[-1]), flush=True)
    if job["whole"]:
        fresh()
        image, timestep, embeds = inputs(2, 256)
        found.append({"whole": True, **timed(lambda: unet(image, timestep, embeds, return_dict=False), job["count"])})
    return found


def group_offload(job: dict[str, Any], tiles: int = 3) -> list[dict[str, Any]]:
    """(c) diffusers' group offload with a stream, one tile pair a call; seconds scaled from ``tiles`` to 25 tiles."""
    from diffusers.hooks import apply_group_offloading

    unet = stock(Path(job["checkpoint"]), "cpu")
    apply_group_offloading(unet, torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    image, timestep, embeds = inputs(2 * tiles)

    def step() -> None:
        for part, text in zip(image.split(2), embeds.split(2), strict=True):
            unet(part, timestep, text, return_dict=False)

    found = timed(step, job["count"])
    return [{**found, "seconds": round(found["seconds"] * TILES / tiles, 4)}]


def streamed(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours, as ``job["plan"]`` says: groups of tile pairs, each a pass over the model."""
    from stages.families.unet import UNET
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import open_model
    from stages.plans import ModelPlan
    from stages.techniques.channels_last import ChannelsLast

    component = Checkpoint.open(job["checkpoint"]).component("unet")
    size, group = 2 * job["micro"], 2 * job["group"]
    begin = time.perf_counter()
    options: dict[str, Any] = {"dtype": torch.float16, "blocks": UNET, "techniques": (ChannelsLast(),)}
    with open_model(component, plan=ModelPlan.of(job["plan"]), micro_batch=size, device="cuda", **options) as streamer:
        opened = time.perf_counter() - begin
        unet: Any = streamer.model
        image, timestep, embeds = inputs(2 * TILES)

        def call(samples: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return unet(samples, timestep, text, return_dict=False)[0]

        def step() -> Tensor:
            parts = zip(image.split(group), embeds.split(group), strict=True)
            if not job["graphs"]:
                return torch.cat([call(part, timestep, text) for part, text in parts])
            return torch.cat([streamer.graphed(call, part, timestep, text).clone() for part, text in parts])

        found = {**timed(step, job["count"]), "open_seconds": round(opened, 2)}
        output = step().cpu()
    reference = Path(job["folder"]) / f"resident{job['micro']}.pt"
    if reference.exists():
        expected = torch.load(reference)
        found["identical"] = bool(torch.equal(expected, output))
        found["max_difference"] = float((expected.float() - output.float()).abs().max())
    return [found]


WAYS = {"resident": resident, "offload": group_offload, "ours": streamed}


def main() -> None:
    job = json.loads(sys.argv[1])
    with torch.inference_mode():
        found = WAYS[job["kind"]](job)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
