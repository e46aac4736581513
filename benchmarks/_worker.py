"""One way of running a denoising step over tiles, in a process of its own.

Started by :mod:`benchmarks.streaming`. Every line on stdin is one step; every answer is a JSON line on stdout.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks._gpu_work import Work
from stages.memory.imports import light_imports
from stages.memory.monitor import own_peak_rss
from stages.techniques.base import Technique
from stages.techniques.dtype import TORCH
from stages.tiles import Size

Step = Callable[[Tensor], list[Tensor]]


def work_of(spec: dict[str, Any]) -> Work:
    """What is to be done."""
    return Work(
        family=spec["family"],
        tile=Size(*spec["tile"]),
        tiles=spec["tiles"],
        dtype=getattr(torch, TORCH[spec["dtype"]]),
        device="cpu",
        guided=spec["guided"],
    )


class Together(Technique):
    """Both halves of a pair go through a kernel at once, as torch does it."""

    name = "together"
    lanes = False

    @classmethod
    def of(cls, config: DictConfig) -> Together:
        return cls()


@contextmanager
def ours(spec: dict[str, Any]) -> Iterator[Step]:
    """Our engine: ``plan`` streams ``group`` tiles at a time; {} keeps all weights: a loop over micro-batches of what
    torch does by itself, or (``lanes``) what it does in each of them."""
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import open_model
    from stages.plans import ModelPlan
    from stages.techniques.attention import Attention
    from stages.techniques.processor import Processor
    from stages.techniques.quantize import Quantize

    work = work_of(spec)
    component = Checkpoint.open(spec["checkpoint"], components=(work.component,)).component(work.component)
    door, config, plan = work.door, component.config, ModelPlan.of(spec["plan"])
    micro = door.micro_batch(config, work.tile, "cpu")
    group = max(1, micro // work.passes) if plan.resident == "all" else spec["group"]
    options: dict[str, Any] = {"dtype": work.dtype, "blocks": door.blocks(work.component), "micro_batch": micro}
    switch: dict[str, str] = spec.get("switch", {})
    own: tuple[Technique, ...] = (Attention(switch["attention"]),) if "attention" in switch else ()
    own = (*own, Quantize(switch["quantize"])) if "quantize" in switch else own
    if plan.resident != "all":
        own = (*own, Processor(spec["dtype"], convolutions=work.facts.unet))
    elif not spec.get("lanes"):
        own = (*own, Together())
    techniques = (*work.techniques, *own)
    with open_model(component, plan=plan, techniques=techniques, **options) as streamer:
        yield looped(work, streamer.model, config, group)


def looped(work: Work, network: Any, config: Any, group: int = 1, **more: Any) -> Step:
    """``group`` tiles a call."""
    denoiser, batch = work.denoiser(network, config, "cpu", **more), work.batch(config, work.tiles)

    def step(timestep: Tensor) -> list[Tensor]:
        with torch.no_grad():
            starts = range(0, work.tiles, group)
            return [found for start in starts for found in denoiser(work.part(batch, start, group), timestep)]

    return step


def stock(spec: dict[str, Any], **options: Any) -> Any:
    """The network as diffusers loads it."""
    work = work_of(spec)
    with light_imports():
        import diffusers
    made: Any = getattr(diffusers, work.facts.classes[work.component])
    return made.from_pretrained(spec["checkpoint"], subfolder=work.component, **options)


def plainly(spec: dict[str, Any], network: Any) -> Step:
    """A tile a call, as a loop over tiles does it, without what this program adds."""
    return looped(work_of(spec), network, network.config, dtype=network.dtype, techniques=())


@contextmanager
def diffusers_fp32(spec: dict[str, Any]) -> Iterator[Step]:
    """What a user of diffusers gets on a CPU: float32, resident."""
    yield plainly(spec, stock(spec))


@contextmanager
def openvino_resident(spec: dict[str, Any]) -> Iterator[Step]:
    """All of it in OpenVINO, in floats of ``dtype`` or, by NNCF, in integers."""
    from benchmarks._openvino_resident import resident

    forward = resident(spec["checkpoint"], spec["scratch"], spec["way"].rpartition(" ")[2], spec["dtype"])
    network = stock(spec, torch_dtype=work_of(spec).dtype).to("meta")
    network.forward = forward
    yield plainly(spec, network)


@contextmanager
def accelerate_disk(spec: dict[str, Any]) -> Iterator[Step]:
    """accelerate's disk dispatch: the weights lie in its folder, a module's are read when it is called."""
    work = work_of(spec)
    with light_imports():
        import diffusers
        from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    folder = f"{spec['checkpoint']}/{work.component}"
    made: Any = getattr(diffusers, work.facts.classes[work.component])
    config: Any = made.load_config(folder)
    with init_empty_weights():
        network: Any = made.from_config(config)
    with tempfile.TemporaryDirectory(dir=spec["scratch"]) as offloaded:
        map_: dict[str, Any] = {name: "disk" for name, _ in network.named_children()}
        map_[list(map_)[-1]] = "cpu"  # with nothing but "disk" accelerate takes it for a device of safetensors
        options: dict[str, Any] = {"offload_folder": offloaded, "dtype": work.dtype, "force_hooks": True}
        weights = f"{folder}/diffusion_pytorch_model.safetensors"
        yield plainly(spec, load_checkpoint_and_dispatch(network, weights, map_, **options))


@contextmanager
def group_offload(spec: dict[str, Any]) -> Iterator[Step]:
    """diffusers' group offload to disk at leaf level."""
    network = stock(spec, torch_dtype=work_of(spec).dtype)
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=spec["scratch"]) as folder:
        apply_group_offloading(network, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=folder)
        yield plainly(spec, network)


WAYS = {
    "streamed": ours,
    "streamed in a cgroup": ours,
    "resident": ours,
    "resident in lanes": ours,
    "streamed int8": ours,
    "streamed int8_weights": ours,
    "streamed openvino": ours,
    "streamed int8 openvino": ours,
    "diffusers fp32": diffusers_fp32,
    "openvino floats": openvino_resident,
    "openvino int8": openvino_resident,
    "accelerate disk": accelerate_disk,
    "group offload": group_offload,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    begin = time.monotonic()
    with WAYS[spec["way"]](spec) as step:
        print(json.dumps({"load_seconds": time.monotonic() - begin}), flush=True)
        for _ in sys.stdin:
            begin, used = time.monotonic(), time.process_time()
            found = step(torch.tensor(500.0))
            seconds, used = time.monotonic() - begin, time.process_time() - used
            digest = hashlib.sha256(torch.stack(found).float().numpy().tobytes()).hexdigest()
            answer = {"seconds": seconds, "cpu_seconds": used, "peak": own_peak_rss(), "digest": digest}
            if spec.get("save"):
                torch.save(torch.stack(found).float(), Path(spec["save"]))
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
