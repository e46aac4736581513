"""What is different on a GPU: the budget is the device's, and so are the rates, the libraries and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stages.job import Job
from stages.memory.planner import PINNED_RATE, Line, StageProfile

LIBRARIES = 30_000_000  # bytes that the allocator gives to the libraries
SLACK = 1.55  # of activations: copies that kernels make for themselves, holes that fit nothing (measured: 1.2 to 1.5)
FLOPS = 2e14  # of a large GPU in fp16; only ranks plans, as the rates do
READ_RATES = {"pinned": PINNED_RATE, "disk": 8e9}  # bytes a second to the device
START_SECONDS = 2e-3  # to begin a pass
KEEP = 1_000_000  # bytes: smaller units stay on the device

# A value that the user set stays.
ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # what is free can be used, wherever it lies
    "CUBLAS_WORKSPACE_CONFIG": ":4096:2",  # KiB; otherwise 32 MiB and more a stream
    "CUBLASLT_WORKSPACE_SIZE": "8192",
    "CUDNN_CONV_WSCAP_DBG": "64",  # MiB: the choice of a kernel must not depend on what happens to be free
}


def for_device(profile: StageProfile, host: str, *, streams: bool = True) -> StageProfile:
    """``profile``, made for the CPU, as it is on the device: no interpreter there, and weights are never repacked.

    Models that do not stream are small and called in no fixed order: all their weights stay.
    """
    cuts = tuple(replace(cut, lines=tuple(map(_on_device, cut.lines))) for cut in profile.cuts)
    return replace(
        profile,
        base=LIBRARIES,
        imports=0,
        extra=0,
        cuts=cuts,
        rate=FLOPS,
        read_rate=READ_RATES[host],
        copy_rate=float("inf"),
        start_seconds=START_SECONDS,
        keep=KEEP,
        streams=streams,
    )


def _on_device(line: Line) -> Line:
    return replace(line, fixed=int(line.fixed * SLACK), slope=int(line.slope * SLACK), workspace=0)


def of_device(plan: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """``plan`` as the stage reads it."""
    made = {**plan, "host": job.config.memory.host, "device_budget": job.device_budget}
    made["predicted_peak_vram_bytes"] = made.pop("predicted_peak_rss_bytes")
    return made
