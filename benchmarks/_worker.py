"""One way of running a denoising step of Stable Diffusion's UNet over tile pairs, in a process of its own.

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
from torch import Tensor

from stages.memory.imports import light_imports
from stages.memory.monitor import own_peak_rss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Step = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


@contextmanager
def ours(spec: dict[str, Any]) -> Iterator[Step]:
    """Our engine: ``plan`` streams ``group`` tile pairs at a time; {} keeps all weights: a loop over tiles."""
    from stages.families.unet import UNET
    from stages.models.checkpoint import Checkpoint
    from stages.models.loading import open_model
    from stages.plans import ModelPlan
    from stages.techniques.channels_last import ChannelsLast

    component = Checkpoint.open(spec["checkpoint"], components=("unet",)).component("unet")
    group = 2 * spec["group"]
    options: dict[str, Any] = {"blocks": UNET, "techniques": (ChannelsLast(),), "micro_batch": 2}
    dtype = DTYPES[spec["dtype"]]
    with open_model(component, dtype=dtype, plan=ModelPlan.of(spec["plan"]), **options) as streamer:

        def step(samples: Tensor, timestep: Tensor, embeds: Tensor) -> list[Tensor]:
            samples = samples.to(dtype)
            found = []
            for part, text in zip(samples.split(group), embeds.to(dtype).split(group), strict=True):
                part = part.contiguous(memory_format=torch.channels_last)
                found += list(streamer.model(part, timestep, encoder_hidden_states=text, return_dict=False)[0])
            return found

        yield step


def looped(unet: Any, dtype: torch.dtype) -> Step:
    """One call a pair, as a plain loop over tiles does it."""

    def step(samples: Tensor, timestep: Tensor, embeds: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        with torch.no_grad():
            for part, text in zip(samples.to(dtype).split(2), embeds.to(dtype).split(2), strict=True):
                found += list(unet(part, timestep, encoder_hidden_states=text, return_dict=False)[0])
        return found

    return step


@contextmanager
def diffusers_fp32(spec: dict[str, Any]) -> Iterator[Step]:
    """What a user of diffusers gets on a CPU: float32, resident."""
    with light_imports():
        from diffusers import UNet2DConditionModel
    yield looped(UNet2DConditionModel.from_pretrained(f"{spec['checkpoint']}/unet"), torch.float32)


@contextmanager
def accelerate_disk(spec: dict[str, Any]) -> Iterator[Step]:
    """accelerate's disk dispatch: the weights lie in its folder, a module's are read when it is called."""
    with light_imports():
        from accelerate import init_empty_weights, load_checkpoint_and_dispatch
        from diffusers import UNet2DConditionModel
    config: Any = UNet2DConditionModel.load_config(f"{spec['checkpoint']}/unet")
    with init_empty_weights():
        unet: Any = UNet2DConditionModel.from_config(config)
    with tempfile.TemporaryDirectory(dir=spec["scratch"]) as folder:
        weights = f"{spec['checkpoint']}/unet/diffusion_pytorch_model.safetensors"
        map_: dict[str, Any] = {name: "disk" for name, _ in unet.named_children()}
        map_["conv_norm_out"] = "cpu"  # with nothing but "disk" accelerate takes it for a device of safetensors
        options: dict[str, Any] = {"offload_folder": folder, "dtype": DTYPES[spec["dtype"]], "force_hooks": True}
        yield looped(load_checkpoint_and_dispatch(unet, weights, map_, **options), options["dtype"])


@contextmanager
def group_offload(spec: dict[str, Any]) -> Iterator[Step]:
    """diffusers' group offload to disk at leaf level."""
    with light_imports():
        from diffusers import UNet2DConditionModel
        from diffusers.hooks import apply_group_offloading
    dtype = DTYPES[spec["dtype"]]
    unet = UNet2DConditionModel.from_pretrained(f"{spec['checkpoint']}/unet", torch_dtype=dtype)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=spec["scratch"]) as folder:
        apply_group_offloading(unet, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=folder)
        yield looped(unet, dtype)


WAYS = {
    "streamed": ours,
    "streamed in a cgroup": ours,
    "resident": ours,
    "diffusers fp32": diffusers_fp32,
    "accelerate disk": accelerate_disk,
    "group offload": group_offload,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2 * spec["pairs"], 4, 64, 64, generator=generator)
    embeds = torch.randn(2 * spec["pairs"], 77, 768, generator=generator)
    begin = time.monotonic()
    with WAYS[spec["way"]](spec) as step:
        print(json.dumps({"load_seconds": time.monotonic() - begin}), flush=True)
        for _ in sys.stdin:
            begin = time.monotonic()
            found = step(samples, torch.tensor(500), embeds)
            seconds = time.monotonic() - begin
            digest = hashlib.sha256(torch.stack(found).float().numpy().tobytes()).hexdigest()
            answer = {"seconds": seconds, "peak": own_peak_rss(), "digest": digest}
            if spec.get("save"):
                torch.save(torch.stack(found).float(), Path(spec["save"]))
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
