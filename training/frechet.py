"""The decoder's part in how far pictures that the model makes are from scenes, as a whole and not one by one.

No scene belongs to a sample, so that no pixel says what is wrong with it; but features of many samples have a mean and
covariances, and so have those of scenes: what goes down is the Fréchet distance between the two (Heusel et al., arXiv
1706.08500), which ``benchmarks embedded_quality`` tells by a network that is not asked here.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import GUIDANCE, denoised
from .efficientnet import EfficientNetLite
from .library import Library
from .perceptual import EPSILON

SIDES = (192, 224)  # pixels that pictures are looked at with, one at a time
EDGE = 8  # pixels of them that are left out, here or there: no pattern of the latents' grid pays
MEMORY = 1500  # pictures over which moments of what is made are averaged
EVERY = 8  # batches after which the way down is computed anew
STEPS = 25  # of a sample, as in the default run


@torch.no_grad()
def sampled_latents(model: Path, library: Library, count: int, device: torch.device, seed: int) -> Tensor:
    """Latents ``[count,C,h,w]`` in fp16, scaled as the denoiser has them, that ``model`` (a diffusers folder) makes of
    captions of a library with guidance and steps of the default run."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    open_unet: Any = UNet2DConditionModel.from_pretrained
    open_text: Any = CLIPTextModel.from_pretrained
    unet = open_unet(model, subfolder="unet", torch_dtype=torch.float32).to(device)
    text = open_text(model, subfolder="text_encoder", dtype=torch.float32).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randint(len(library.tokens) // 2, (count,), generator=generator, device=device)
    found = []
    for some in rows.split(512):
        scheduler: Any = DPMSolverMultistepScheduler.from_pretrained(model, subfolder="scheduler")
        scheduler.set_timesteps(STEPS, device=device)
        size = (len(some), unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        x = torch.randn(size, generator=generator, device=device)
        x = denoised(unet, text, library, library.tokens[some], x, scheduler, GUIDANCE)
        found.append(x.half())
    return torch.cat(found)


class Moments:
    """Mean and covariance of features ``[n,d]``, of the last ``memory`` or so of them."""

    def __init__(self, size: int, memory: float, device: torch.device) -> None:
        self.memory, self.seen = memory, 0
        self.mean = torch.zeros(size, device=device, dtype=torch.float64)
        self.second = torch.zeros(size, size, device=device, dtype=torch.float64)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """So many more of them."""
        features = features.double()
        self.seen += len(features)
        share = len(features) / min(self.seen, self.memory)
        self.mean.lerp_(features.mean(0), share)
        self.second.lerp_(features.T @ features / len(features), share)

    @property
    def covariance(self) -> Tensor:
        """``[d,d]``."""
        return self.second - torch.outer(self.mean, self.mean)


class Distance:
    """The Fréchet distance of features to moments that are wanted, by its slope at each of them."""

    def __init__(self, wanted: Moments) -> None:
        self.wanted, self.trace = wanted.mean, wanted.covariance.trace()
        values, vectors = torch.linalg.eigh(wanted.covariance)
        self.root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        self.got, self.batches, self.value = Moments(len(values), MEMORY, values.device), 0, 0.0
        self._slope = torch.zeros_like(self.root, dtype=torch.float32)

    def add(self, features: Tensor) -> None:
        """Only remember what is made."""
        self.got.add(features.detach())

    def __call__(self, features: Tensor) -> Tensor:
        """A number with the gradient that the distance has, in shares of the spread of what is wanted. features
        ``[n,d]``: a few; where they lie is told by all that was seen lately."""
        self.add(features)
        if self.batches % EVERY == 0:
            self._look()
        self.batches += 1
        apart = (self.got.mean - self.wanted).float()
        beside = features - self.got.mean.float()
        each = 2 * features @ apart + ((beside @ self._slope) * beside).sum(1)
        return each.mean() / self.trace.float()

    @torch.no_grad()
    def _look(self) -> None:
        """The distance, and its slope along covariances ``C``: ``1 - R (R C R)^(-1/2) R`` with the root ``R`` of those
        that are wanted."""
        covariance = self.got.covariance
        values, vectors = torch.linalg.eigh(self.root @ covariance @ self.root)
        roots = values.clamp_min(0).sqrt()
        inverse = (vectors / roots.clamp_min(EPSILON * roots.max())) @ vectors.T
        self._slope = (torch.eye(len(roots), device=roots.device) - self.root @ inverse @ self.root).float()
        apart = (self.got.mean - self.wanted).square().sum()
        self.value = ((apart + covariance.trace() + self.trace - 2 * roots.sum()) / self.trace).item()


class Frechet:
    """Distances of features' means over a picture, at each level of each network and with each side.

    dtype: what the networks compute in. scenes: batches ``[B,3,H,W]`` in [-1,1] that what is made is held against.
    latents: those that are decoded, as :func:`sampled_latents` gives them.
    """

    def __init__(
        self,
        networks: list[EfficientNetLite],
        dtype: torch.dtype,
        scenes: Iterable[Tensor],
        latents: Tensor,
        rng: random.Random,
    ):
        self.networks, self.dtype, self.latents, self.rng = networks, dtype, latents, rng
        wanted: dict[tuple[int, int, int], Moments] = {}
        with torch.no_grad():
            for images in scenes:
                for side in SIDES:
                    for key, features in self._features(images, side):
                        if key not in wanted:
                            wanted[key] = Moments(features.shape[1], float("inf"), images.device)
                        wanted[key].add(features)
        self.distances = {key: Distance(moments) for key, moments in wanted.items()}

    def _features(self, images: Tensor, side: int) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        top, left = (self.rng.randrange(EDGE + 1) for _ in range(2))
        high, wide = (length - EDGE for length in images.shape[-2:])
        seen = images[..., top : top + high, left : left + wide].float()
        small = F.interpolate(seen, (side, side), mode="bilinear", antialias=True, align_corners=False)
        small = small.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for number, network in enumerate(self.networks):
            for level, found in enumerate(network.levels(small)):
                yield (side, number, level), found.float().mean((2, 3))

    @torch.no_grad()
    def begin(self, decode: Callable[[Tensor], Tensor]) -> None:
        """Remember what is made of the latents now: covariances of few pictures say nothing. decode: latents to
        pictures ``[B,3,H,W]`` in [-1,1]."""
        for some in self.latents[: 2 * MEMORY].split(64):
            images = decode(some)
            for side in SIDES:
                for key, features in self._features(images, side):
                    self.distances[key].add(features)

    def __call__(self, decode: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """What goes down, of pictures of ``count`` of the latents."""
        images = decode(self.latents[self.rng.sample(range(len(self.latents)), count)])
        side = self.rng.choice(SIDES)
        return torch.stack([self.distances[key](features) for key, features in self._features(images, side)]).mean()

    @property
    def value(self) -> float:
        """The distance of the last levels, in shares of the spread of scenes, averaged."""
        last = max(level for _, _, level in self.distances)
        found = [distance.value for (_, _, level), distance in self.distances.items() if level == last]
        return sum(found) / len(found)
