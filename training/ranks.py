"""Several processes, one a GPU, that train the same weights: every one renders scenes of its own, gradients are shared.

Without ``start`` there is one process, and everything here does nothing.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MEETING = "TRAINING_MEETING"  # in a process' environment: the file by which all find one another


def launch(count: int, argv: Sequence[str]) -> int:
    """Run ``training.train`` in ``count`` processes; returns their worst exit code. One that fails ends all."""
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(count), MEETING: str(Path(folder) / "meeting")}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "training.train", *argv]
        running = []
        for i in range(count):  # each sees its own GPU as the first one, so that they share what torch.compile keeps
            own = {"RANK": str(i), "CUDA_VISIBLE_DEVICES": str(i)}
            running.append(subprocess.Popen(command, env=os.environ | shared | own))
        while any(one.poll() is None for one in running):
            if any(one.poll() for one in running):
                for one in running:
                    one.terminate()
            time.sleep(0.2)
    return max(abs(one.returncode) for one in running)


def start(device: str) -> torch.device:
    """Join the processes that ``launch`` started, if it did; returns the device of this one."""
    if MEETING in os.environ:  # the CPU's group agrees on times without waiting for the GPU
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        meeting = Path(os.environ[MEETING]).as_uri()
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    return torch.device(device)


def rank() -> int:
    """Number of this process; 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(*values: float) -> list[float]:
    """The values that rank 0 has."""
    if not dist.is_initialized():
        return list(values)
    told = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(told, 0)
    return told.tolist()


def mean_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Replace every gradient by the mean over the processes; one message for all."""
    if not dist.is_initialized():
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads: list[Any] = [p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))  # in place: fused optimisers want gradients laid out as their parameters
