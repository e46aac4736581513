"""What is different on a GPU: the budget is the device's, and so are the rates, the libraries and the environment."""

from __future__ import annotations

from dataclasses import replace

from stages.memory.planner import PINNED_RATE, Cut, Line, ModelProfile, StageProfile

# Of activations: copies that kernels make for themselves, holes that fit nothing (``benchmarks gpu_memory``).
SLACK = 1.55  # of what one micro-batch takes
GATHERED = 1.1  # of what every one of a group has besides, while a unit runs
BETWEEN = 1.4  # the same between units, where operations of the whole group make and free all of it
LIBRARIES = 30_000_000  # bytes that the allocator gives to the libraries
FLOPS = 4.2e14  # a second, of an H200 with a transformer in bf16; only ranks plans, as the rates do
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


def for_device(stage: StageProfile, host: str) -> StageProfile:
    """``stage``, looked at for the CPU, as it is on the device: no interpreter there, weights are never repacked, and
    models that are called in no fixed order (small ones) keep all their weights."""
    return replace(
        stage,
        base=LIBRARIES,
        imports=0,
        extra=0,
        models=tuple(map(_model, stage.models)),
        rate=FLOPS,
        read_rate=READ_RATES[host],
        copy_rate=float("inf"),
        given_rate=float("inf"),
        start_seconds=START_SECONDS,
    )


def _model(model: ModelProfile) -> ModelProfile:
    return replace(model, cuts=tuple(map(on_device, model.cuts)), keep=KEEP, streams=model.ordered)


def on_device(cut: Cut) -> Cut:
    """``cut`` with what activations take there."""
    return replace(cut, lines=tuple(map(_line, cut.lines)))


def _line(line: Line) -> Line:
    slope = int(line.slope * (GATHERED if line.unit else BETWEEN))
    return replace(
        line, fixed=int(line.fixed * SLACK), slope=slope, gathered=int(line.gathered * GATHERED), workspace=0
    )
