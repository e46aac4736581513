"""A UNet whole in OpenVINO, its weights resident: what a step of ours is held against.

``python -m benchmarks._openvino_resident CHECKPOINT FILE.xml int8`` converts one, in a process of its own: that takes
several minutes and 16 GB. ``int8`` by NNCF (``pip install nncf``), weights and activations, on four random samples: the
time of a pass hangs on no number.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHAPES = {"sample": (2, 4, 64, 64), "timestep": (), "encoder_hidden_states": (2, 77, 768)}  # a guided tile
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's words for a dtype


class Plain(nn.Module):
    """What is converted: tensors in, a tensor out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.network(sample, timestep, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]


def convert(checkpoint: str, file: str, way: str) -> None:
    """Write the UNet of ``checkpoint`` to ``file``."""
    import diffusers
    import openvino

    network = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").eval()
    with torch.no_grad():
        made = openvino.convert_model(Plain(network), example_input=drawn(500.0), input=list(SHAPES.values()))
    if way == "int8":
        nncf: Any = import_module("nncf")  # no package of this project: pip install nncf
        samples = nncf.Dataset([tuple(one.numpy() for one in drawn(step)) for step in (900.0, 600.0, 300.0, 50.0)])
        made = nncf.quantize(made, samples, subset_size=4, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(made, file, compress_to_fp16=False)


def drawn(timestep: float) -> tuple[Tensor, ...]:
    """Inputs of a pass."""
    first, _, last = SHAPES.values()
    return torch.randn(first), torch.tensor(timestep), torch.randn(last)


def resident(checkpoint: str, scratch: str, way: str, dtype: str) -> Callable[..., tuple[Tensor]]:
    """A pass of the UNet in ``dtype``, layers in integers where ``way`` is int8, called as diffusers' own."""
    import openvino

    file = Path(scratch) / f"openvino-{way}.xml"
    subprocess.run([sys.executable, "-m", __name__, checkpoint, str(file), way], check=True, stdout=sys.stderr)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[dtype]}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(str(file), "CPU", {**options, **threads}).create_infer_request()

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        given = (sample, torch.as_tensor(timestep), encoder_hidden_states)
        (found,) = request.infer([one.float().contiguous().numpy() for one in given]).values()
        return (torch.from_numpy(found).to(sample.dtype),)

    return forward


if __name__ == "__main__":
    convert(*sys.argv[1:])
