"""A row of ``benchmarks.techniques`` in a process of its own: ``python -m benchmarks._techniques_ways JOB``."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from stages.memory.monitor import own_peak_rss

MB = 1_000_000
PROMPT = "a lighthouse on a cliff at sunset"
WARM = 2  # steps that are not timed: kernels are chosen, graphs recorded


def on_gpu(job: dict[str, Any]) -> bool:
    return job["device"] == "cuda"


def peaks(job: dict[str, Any]) -> dict[str, int]:
    """MB at most so far, of the allocator and of the process."""
    found = {"host_mb": round(own_peak_rss() / MB)}
    if on_gpu(job):
        found["allocated_mb"] = round(torch.cuda.max_memory_allocated() / MB)
        found["reserved_mb"] = round(torch.cuda.max_memory_reserved() / MB)
    return found


def speed(marks: Sequence[float], interval: int = 1) -> dict[str, float]:
    """Of the moments at which steps ended: the first is the beginning. Steps of an ``interval`` are not alike: the mean
    of all of them, but for the first interval."""
    seconds = [after - before for before, after in pairwise(marks)]
    if interval > 1:
        timed = seconds[interval - 1 : len(marks) // interval * interval - 1]
        return {"step_seconds": round(fmean(timed), 5), "steps": len(timed)}
    timed = seconds[WARM:] or seconds
    return {"step_seconds": round(median(timed), 5), "steps": len(timed)}


class Clock:
    """The moments at which steps ended, and the CPU-seconds of this process then: what other work on the machine does
    not add to."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def speed(self, interval: int = 1) -> dict[str, float]:
        moments, worked = zip(*self._marks, strict=True)
        return {**speed(moments, interval), "cpu_seconds": speed(worked, interval)["step_seconds"]}


def stock(job: dict[str, Any]) -> dict[str, Any]:
    """diffusers' own pipeline with its own switches."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler

    options, work, device = job["options"], job["work"], job["device"]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.get("tf32", False)
    dtype = getattr(torch, options.get("dtype", "float32"))
    pipe: Any = StableDiffusionPipeline.from_pretrained(job["checkpoint"], dtype=dtype, safety_checker=None)
    scheduler: Any = {"ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler}[work["scheduler"]]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if options.get("channels_last"):
        pipe.unet.to(memory_format=torch.channels_last)
    if options.get("attention") == "math":
        from diffusers.models.attention_processor import AttnProcessor

        pipe.unet.set_attn_processor(AttnProcessor())
    elif options.get("attention") == "sliced":
        pipe.enable_attention_slicing()
    elif options.get("attention") == "xformers":
        pipe.enable_xformers_memory_efficient_attention()
    if options.get("vae_slicing"):
        pipe.vae.enable_slicing()
    if options.get("vae_tiling"):
        pipe.vae.enable_tiling()
    _offload(pipe, options.get("offload", "none"), device)
    if options.get("compile") == "compile":
        pipe.unet.compile(dynamic=False)
    elif options.get("compile") == "trace":
        _trace(pipe, work, device, dtype)
    clock = Clock()

    def ended(*arguments: Any) -> dict[str, Any]:
        if on_gpu(job):
            torch.cuda.synchronize()
        clock.mark()
        return arguments[-1]

    def picture(steps: int) -> Any:
        shape = (work["batch"], 4, work["height"] // 8, work["width"] // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # of any dtype the same numbers
        call = {"width": work["width"], "height": work["height"], "num_inference_steps": steps}
        call |= {"latents": noise.to(dtype), "num_images_per_prompt": work["batch"]}
        return pipe(PROMPT, **call, callback_on_step_end=ended).images[0]

    picture(1)  # all libraries are set up, all is compiled
    clock.restart()
    begin = time.perf_counter()
    made = picture(job["steps"])
    seconds = time.perf_counter() - begin
    made.save(job["picture"])
    return {**clock.speed(), "picture_seconds": round(seconds, 2), **peaks(job)}


def _offload(pipe: Any, way: str, device: str) -> None:
    if way == "none":
        pipe.to(device)
    elif way == "model":
        pipe.enable_model_cpu_offload()
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        options = {"onload_device": torch.device(device), "offload_type": "leaf_level", "use_stream": True}
        pipe.enable_group_offload(**options)


def _trace(pipe: Any, work: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    """The UNet as ``torch.jit.trace`` of it."""
    unet = pipe.unet.requires_grad_(False)  # its weights become constants of the function
    shape = (2 * work["batch"], unet.config.in_channels, work["height"] // 8, work["width"] // 8)
    states = torch.randn(shape[0], 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    inputs = torch.randn(shape, device=device, dtype=dtype), torch.tensor(1, device=device), states

    def predict(sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return stock_forward(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]

    stock_forward = unet.forward
    with torch.inference_mode():
        traced: Any = torch.jit.trace(predict, inputs, check_trace=False)

    def forward(sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        return (traced(sample, timestep.to(sample.device), encoder_hidden_states),)

    unet.forward = forward


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """The stages of a planned run one after the other, each in a process of its own; the steps of ``denoise``.

    They are forks of this one, which has imported torch and not touched the device: what a stage holds ends with it.
    """
    from stages.documents import load
    from stages.job import Job
    from stages.workflow.graph import build
    from stages.workflow.store import Store

    run_dir = Path(job["run_dir"])
    run = Job.of(load(run_dir / "config.yaml"))
    states = build(run, Store(Path(run.config.output_dir) / ".store"), verify=False)
    interval = run.config.technique.step_cache.interval or 1
    found: dict[str, Any] = {"stages": {}}
    for state in states:
        stage = _forked(lambda name=state.name: _stage(job, name, run_dir, interval))
        steps = stage.pop("denoise", {})
        found["stages"][state.name] = stage
        found |= steps
    for name in next(iter(found["stages"].values())).keys() - {"seconds"}:
        found[name] = max(stage[name] for stage in found["stages"].values())
    image = states[-1].entry.path / "image.png"
    Path(job["picture"]).write_bytes(image.read_bytes())
    return found


def _stage(job: dict[str, Any], name: str, run_dir: Path, interval: int) -> dict[str, Any]:
    from stages import __main__
    from stages.context import Progress

    clock = Clock()

    class Steps(Progress):
        def advance(self, n: int = 1) -> None:
            clock.mark()

    begin = time.perf_counter()
    __main__.run(name, run_dir, "stages", Steps(), True)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 2), **peaks(job)}
    return found | ({"denoise": clock.speed(interval)} if name == "denoise" else {})


def _forked(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``call`` gives in a child. RuntimeError where it fails; its own words have been printed by then."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(call()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a stage failed")
    return json.loads(text)


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"stock": stock, "ours": ours}

if __name__ == "__main__":
    JOB = json.loads(sys.argv[1])
    print("RESULT " + json.dumps(WAYS[JOB["kind"]](JOB)))
