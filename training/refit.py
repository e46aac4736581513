"""The decoder's last convolution by least squares: ``python -m training.refit --out FILE``, minutes on a CPU.

What the loss of training asks for beside pixels (edges, texture) costs decibels. Of all weights of the last convolution
those of least squares cost least, and return less texture: this moves it part of the way there. Latents stay valid.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .library import Library
from .models import MODEL, halves, save_halves
from .source import Source

CROPS = 4  # one group in as many is of crops
RIDGE = 1e-6  # of the mean of what stands on the diagonal


@torch.no_grad()
def least_squares(vae: Any, source: Source, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[3,C,3,3]`` and bias ``[3]`` of the decoder's last convolution that return ``groups`` of scenes with the
    least squared error."""
    last = vae.decoder.conv_out
    size = last.in_channels * 9 + 1
    inner, outer = (torch.zeros(size, n, dtype=torch.float64) for n in (size, 3))
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for group in range(groups):
        for image in source.draw(crops=group % CROPS == CROPS - 1).images.split(1):
            vae.decode(vae.encode(image).latent_dist.mode())
            columns = F.unfold(F.pad(seen.pop(), (1, 1, 1, 1)), 3)[0]
            columns = torch.cat([columns, torch.ones_like(columns[:1])])
            inner += columns @ columns.T
            outer += columns @ image.flatten(2)[0].T
    hook.remove()
    inner += RIDGE * inner.diagonal().mean() * torch.eye(size)
    found = torch.linalg.solve(inner, outer).float()
    return found[:-1].T.reshape_as(last.weight), found[-1]


@torch.no_grad()
def refit(vae: Any, source: Source, groups: int, share: float) -> None:
    """Move the decoder's last convolution ``share`` (0 to 1) of the way to ``least_squares``."""
    weight, bias = least_squares(vae, source, groups)
    vae.decoder.conv_out.weight.lerp_(weight, share)
    vae.decoder.conv_out.bias.lerp_(bias, share)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the autoencoder's weights, fp16")
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder to go on from")
    parser.add_argument("--share", type=float, default=0.15, help="of the way to least squares")
    parser.add_argument("--groups", type=int, default=40, help="of two scenes each")
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args(argv)
    vae: Any = AutoencoderKL.from_pretrained(given.model, subfolder="vae", torch_dtype=torch.float32).eval()
    source = Source(Library.make(60, 2, 4241, "cpu"), "cpu", 4242, size=given.size)
    refit(vae, source, given.groups, given.share)
    save_halves(halves(vae), given.out)


if __name__ == "__main__":
    main()
