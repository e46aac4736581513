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

from benchmarks._gpu_work import DEVICE, WORKS
from stages.memory.imports import light_imports

MB = 1_000_000


def stock(job: dict[str, Any], device: str) -> Any:
    """The denoiser as diffusers loads it."""
    work = WORKS[job["work"]]
    with light_imports():
        import diffusers
    made: Any = getattr(diffusers, work.facts.classes[work.component])
    network = made.from_pretrained(job["checkpoint"], subfolder=work.component, torch_dtype=work.dtype)
    return network.eval().requires_grad_(False).to(device)


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
    """(b) a loop over tiles, ``micros`` at a time, and (a) the whole canvas in one call; weights stay there."""
    work, network = WORKS[job["work"]], stock(job, DEVICE)
    if work.techniques:
        network = network.to(memory_format=torch.channels_last)
    denoiser, batch = work.denoiser(network, network.config, DEVICE), work.batch(network.config, work.tiles)
    timestep, found = torch.tensor(500.0, device=DEVICE), []
    for micro in job["micros"]:
        fresh()

        def step(size: int = micro) -> Tensor:
            starts = range(0, work.tiles, size)
            return torch.cat([denoiser(work.part(batch, start, size), timestep) for start in starts])

        found.append({"micro": micro, **timed(step, job["count"])})
        if job["keep"]:
            torch.save(step().cpu(), Path(job["folder"]) / f"resident{micro}.pt")
        print(json.dumps(found[-1]), flush=True)
    if job["whole"] and work.whole:
        fresh()
        canvas = work.batch(network.config, 1, work.whole)
        found.append({"whole": True, **timed(lambda: denoiser(canvas, timestep), job["count"])})
    return found


def group_offload(job: dict[str, Any]) -> list[dict[str, Any]]:
    """(c) diffusers' group offload with a stream, one tile a call; seconds scaled to all tiles."""
    from diffusers.hooks import apply_group_offloading

    work, network = WORKS[job["work"]], stock(job, "cpu")
    options: dict[str, Any] = {"use_stream": True, "offload_type": job["level"]}
    if job["level"] == "block_level":
        options["num_blocks_per_group"] = 1
    apply_group_offloading(network, torch.device(DEVICE), torch.device("cpu"), **options)
    denoiser, batch = work.denoiser(network, network.config, DEVICE), work.batch(network.config, work.offloaded)
    timestep = torch.tensor(500.0, device=DEVICE)

    def step() -> None:
        for start in range(work.offloaded):
            denoiser(work.part(batch, start, 1), timestep)

    found = timed(step, job["count"])
    return [{**found, "seconds": round(found["seconds"] * work.tiles / work.offloaded, 4)}]


def streamed(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours, as ``job["plan"]`` says: groups of tiles, each a pass over the model."""
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import open_model
    from stages.plans import ModelPlan

    work = WORKS[job["work"]]
    component = Checkpoint.open(job["checkpoint"], components=(work.component,)).component(work.component)
    blocks = work.door.blocks(work.component)
    begin = time.perf_counter()
    options: dict[str, Any] = {"dtype": work.dtype, "blocks": blocks, "techniques": work.techniques}
    options |= {"plan": ModelPlan.of(job["plan"]), "micro_batch": work.passes * job["micro"], "device": DEVICE}
    with open_model(component, **options) as streamer:
        opened = time.perf_counter() - begin
        run = {"run": streamer.graphed} if job["graphs"] else {}
        denoiser = work.denoiser(streamer.model, component.config, DEVICE, **run)
        batch, timestep = work.batch(component.config, work.tiles), torch.tensor(500.0, device=DEVICE)

        def step() -> Tensor:
            starts = range(0, work.tiles, job["group"])
            return torch.cat([denoiser(work.part(batch, start, job["group"]), timestep) for start in starts])

        found = {**timed(step, job["count"]), "open_seconds": round(opened, 2)}
        output = step().cpu()
    reference = Path(job["folder"]) / f"resident{job['micro']}.pt"
    if reference.exists():
        expected = torch.load(reference)
        found["identical"] = bool(torch.equal(expected, output))
        found["max_difference"] = float((expected - output).abs().max())
    return [found]


WAYS = {"resident": resident, "offload": group_offload, "ours": streamed}


def main() -> None:
    job = json.loads(sys.argv[1])
    with torch.inference_mode():
        found = WAYS[job["kind"]](job)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
