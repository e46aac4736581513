"""How unlike two pictures look to networks that know photographs."""

import random
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .efficientnet import EfficientNetLite

VARIANTS = (1, 2)  # the benchmark judges by variant 0
SCALES = (0.75, 0.875, 1.0, 1.25)
SIDE = 128  # pixels of the squares that are looked at: few shapes, as kernels of each are chosen anew
SHIFT = 32  # pixels: of the coarsest level
EPSILON = 1e-3


class Perceptual:
    """The distance between features of frozen networks at five resolutions (after Zhang et al., arXiv 1801.03924).

    Pictures are looked at square by square of ``SIDE`` pixels; each time both are enlarged or made smaller, mirrored
    and rolled alike, so that no pattern of one grid pays. dtype: what the networks compute in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, variants: Iterable[int] = VARIANTS):
        self.dtype = dtype
        self.networks = [EfficientNetLite(variant).to(device, dtype) for variant in variants]
        for network in self.networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, got: Tensor, want: Tensor, rng: random.Random) -> Tensor:
        """The mean of ``|f(got) - f(want)|`` over levels and networks, each channel in its spread over ``want``.

        got, want: ``[B,3,H,W]`` in [-1,1]; sides above ``SIDE`` pixels are multiples of it.
        """
        both = torch.cat([squares(got), squares(want)])
        both = both.roll((rng.randrange(SHIFT), rng.randrange(SHIFT)), (-2, -1))
        if rng.random() < 0.5:
            both = both.flip(-1)
        scale = rng.choice(SCALES)
        if scale != 1:
            both = F.interpolate(both, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)
        both = both.to(self.dtype).contiguous(memory_format=torch.channels_last)
        found = []
        for network in self.networks:
            for level in network.levels(both):
                ours, theirs = level.float().chunk(2)
                spread = theirs.detach().std((0, 2, 3), keepdim=True) + EPSILON
                found.append(((ours - theirs) / spread).abs().mean())
        return torch.stack(found).mean()


def squares(images: Tensor) -> Tensor:
    """``[B,3,H,W]`` as ``[n,3,SIDE,SIDE]``, or as it is where it is no larger."""
    if max(images.shape[-2:]) <= SIDE:
        return images
    return images.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


class Balance:
    """A weight that gives one term of a loss a fixed share of the gradient that another has on the same tensor.

    Looked at on the first step and every ``every`` ones.
    """

    def __init__(self, share: float, every: int = 16):
        self.share, self.every, self.steps, self.weight = share, every, 0, 0.0

    def __call__(self, term: Tensor, other: Tensor, on: Tensor) -> float:
        """The weight of ``term``, so that its gradient is ``share`` times ``other``'s."""
        if self.steps % self.every == 0:
            sizes = [torch.autograd.grad(x, on, retain_graph=True)[0].norm() for x in (term, other)]
            found = self.share * (sizes[1] / sizes[0].clamp_min(1e-12)).item()
            self.weight = found if self.steps == 0 else 0.9 * self.weight + 0.1 * found
        self.steps += 1
        return self.weight
