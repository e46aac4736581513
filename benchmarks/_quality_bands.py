"""Sharpness by band: the energy of pictures' luma an octave of frequencies at a time, against that of scenes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._quality_scenes import Scene, pictures, returned
from training.losses import laplacian

LUMA = (0.299, 0.587, 0.114)
OCTAVES = 5


def octaves(images: Tensor) -> Tensor:
    """Energy of each octave, ``[n, 5]``, the finest first: waves of 2-4, 4-8, 8-16, 16-32 and 32-64 pixels.

    A Hann window keeps what differs between a picture's left and right edge from counting as detail. Waves along the
    diagonal finer than two pixels are left out.
    """
    luma = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMA))
    height, width = luma.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    power = torch.fft.fft2((luma - luma.mean((1, 2), keepdim=True)) * window).abs().square()
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))  # cycles a pixel
    bands = [(radius <= 0.5**k) & (radius > 0.5 ** (k + 1)) for k in range(1, OCTAVES + 1)]
    return torch.stack([power[:, band].sum(1) for band in bands], 1)


def names() -> list[str]:
    """Of the octaves, in their order."""
    return [f"{2**k}-{2 ** (k + 1)} px" for k in range(1, OCTAVES + 1)]


def mean_energy(rows: Iterable[Tensor]) -> np.ndarray:
    """The mean of each octave, of what ``octaves`` gave batch by batch."""
    return torch.cat(list(rows)).double().mean(0).numpy()


def by_name(energy: np.ndarray, scenes: np.ndarray) -> dict[str, float]:
    """Energy over that of scenes for each octave."""
    return {name: round(float(share), 3) for name, share in zip(names(), energy / scenes, strict=True)}


def autoencoder(model: Path, scenes: list[Scene]) -> dict[str, Any]:
    """Of held-out scenes after encoding and decoding: mean and worst PSNR in dB, the share of their Laplacian energy
    that is left (of the finest detail), and the energy of each octave over theirs."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).eval()
    values, energy, bands = list[float](), np.zeros(2), np.zeros((2, OCTAVES))
    for images in pictures(scenes):
        back = returned(vae, images)
        error = (back - images).square().mean((1, 2, 3))
        values += (10 * torch.log10(4.0 / error)).tolist()
        energy += [float(laplacian(x).square().mean((1, 2, 3)).sum()) for x in (back, images)]
        bands += [octaves(x).double().sum(0).numpy() for x in (back, images)]
    return {
        "mean": round(float(np.mean(values)), 2),
        "worst": round(min(values), 2),
        "laplacian_share": round(float(energy[0] / energy[1]), 4),
        "bands": by_name(*bands),
        "scenes": len(scenes),
    }
