"""A small classifier of time of day, main subject and setting, trained on rendered scenes only.

``classify(images)`` is the public face: benchmarks and tests judge generated pictures with it.
"""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .specs import SETTINGS, SUBJECTS, TIMES

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
ATTRIBUTES = {"time": TIMES, "subject": SUBJECTS, "setting": SETTINGS}
INPUT_SIZE = 192


class Classifier(nn.Module):
    """Five strided stages, each with a residual layer, and a head for each attribute; 1.9 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192, 256)):
        super().__init__()
        self.stages = nn.ModuleList()
        before = 3
        for width in widths:
            layers = [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width)]
            inner = [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)]
            self.stages.append(nn.ModuleList([nn.Sequential(*layers), nn.Sequential(*inner)]))
            before = width
        self.heads = nn.ModuleDict({name: nn.Linear(2 * before, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """images ``[B,3,H,W]`` in [-1,1], any size and aspect. Returns ``[B,512]``: what the heads are told."""
        images = F.interpolate(
            images.float(), (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False
        )
        features = images.to(next(self.parameters()).dtype)
        for down, more in self.stages:  # type: ignore[misc]
            features = down(features)
            features = F.silu(features + more(features))
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images ``[B,3,H,W]`` as for ``features``. Returns logits ``[B,classes]`` for each attribute."""
        pooled = self.features(images)
        return {name: head(pooled) for name, head in self.heads.items()}


@lru_cache(maxsize=1)
def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier. Raises FileNotFoundError, naming the command, where the weights are missing."""
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(
            f"classifier: no weights at {path}; train them with `python -m training.train --out DIR`"
        )
    model = Classifier()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()


@torch.no_grad()
def classify(images: torch.Tensor, model: Classifier | None = None) -> dict[str, dict]:
    """Judge pictures ``[B,3,H,W]`` in [-1,1].

    Returns for ``time``, ``subject`` and ``setting`` each ``{"labels": [B] names, "probabilities": [B,classes]}``;
    the classes' order is ``ATTRIBUTES``.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"classify: got a tensor of shape {tuple(images.shape)}; expected [B,3,H,W] in [-1,1]")
    logits = (model or load_classifier())(images.float())
    out = {}
    for name, values in ATTRIBUTES.items():
        probabilities = logits[name].softmax(1)
        out[name] = {"labels": [values[i] for i in probabilities.argmax(1).tolist()], "probabilities": probabilities}
    return out
