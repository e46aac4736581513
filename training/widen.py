"""More latent channels and layers for a trained model: ``python -m training.widen FOLDER DIR`` writes flat files to go
on from.

FOLDER is a diffusers folder whose autoencoder has fewer channels than ``models.LATENT_CHANNELS``, or whose denoiser has
fewer layers than ``models.LAYERS``; what has as many is written as it is, to go on from. The larger networks begin as
the ones that were trained: the first channels mean what they meant, the denoiser sees and says nothing of the new ones,
and its new layers change nothing (``training.deepen``). ``training.train --anchor FOLDER/vae`` then keeps the first
channels there while the others learn.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .deepen import begin_as_identities, deeper_names
from .export import write_flat
from .models import LATENT_CHANNELS, make_unet, make_vae, parameter_count
from .source import Source

DETAIL = 0.6  # standard deviation of the new channels over that of the first: what is fine drowns in noise earlier


def _moments(channels: int) -> list[int]:
    """Rows of mean and of log-variance of the first ``channels`` among those of all."""
    return [*range(channels), *range(LATENT_CHANNELS, LATENT_CHANNELS + channels)]


@torch.no_grad()
def widen_vae(wide: Any, trained: Any) -> None:
    """The weights of ``trained``, an AutoencoderKL, into ``wide``: the same latents in the first channels, and the same
    picture of them while the new ones are 0. Both in float32; new rows and columns keep what they began with."""
    few = trained.config.latent_channels
    rows, state = _moments(few), wide.state_dict()
    for name, value in trained.state_dict().items():
        into = state[name]
        if into.shape == value.shape:
            into.copy_(value)
        elif name.startswith("quant_conv.weight"):
            into[rows] = 0.0
            into[torch.tensor(rows)[:, None], torch.tensor(rows)] = value
        elif name.startswith("post_quant_conv.weight"):
            into[:few] = 0.0
            into[:few, :few] = value
        elif name.startswith(("quant_conv", "encoder.conv_out")):
            into[rows] = value
        elif name.startswith("post_quant_conv"):
            into[:few] = value
        elif name == "decoder.conv_in.weight":
            into[:, :few], into[:, few:] = value, 0.0
        else:
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected {tuple(into.shape)} or fewer latent channels")
    wide.load_state_dict(state)


@torch.no_grad()
def widen_unet(wide: Any, trained: Any) -> None:
    """Weights of ``trained``, a UNet2DConditionModel, into ``wide``: new channels are not read, and said to be 0; new
    layers change nothing."""
    names = deeper_names(trained, wide)
    begin_as_identities(wide, set(names.values()))
    few, state = trained.config.in_channels, wide.state_dict()
    for name, value in trained.state_dict().items():
        into = state[names[name]]
        if into.shape == value.shape:
            into.copy_(value)
            continue
        into.zero_()
        into[(slice(None), slice(few)) if name == "conv_in.weight" else slice(few)] = value
    wide.load_state_dict(state)


@torch.no_grad()
def scale_channels(vae: Any, factors: torch.Tensor) -> None:
    """Multiply the latents' channels by ``factors`` ``[channels]``; pictures that come back stay the same."""
    mean, spread = vae.quant_conv.bias.chunk(2)
    vae.quant_conv.weight[: len(factors)] *= factors[:, None, None, None]
    vae.quant_conv.bias.copy_(torch.cat([mean * factors, spread + 2 * factors.log()]))
    vae.post_quant_conv.weight /= factors[None, :, None, None]


@torch.no_grad()
def settle(vae: Any, anchor: Any, source: Source, rounds: int = 8) -> float:
    """Give the channels that ``anchor`` does not have their share of the latents' spread (``DETAIL``); returns the
    factor by which latents are scaled, which is the anchor's."""
    few, scale = anchor.config.latent_channels, anchor.config.scaling_factor
    found = torch.cat([vae.encode(source.draw(crops=False).images).latent_dist.mode() for _ in range(rounds)])
    factors = torch.ones(found.shape[1], device=found.device)
    factors[few:] = DETAIL / scale / found.std((0, 2, 3))[few:]
    scale_channels(vae, factors)
    return scale


def main() -> None:
    """Command line."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    kinds: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    had = {
        name: kind.from_pretrained(given.folder / name, torch_dtype=torch.float32).eval()
        for name, kind in kinds.items()
    }
    few = had["vae"].config.latent_channels
    if few > LATENT_CHANNELS:
        sys.exit(f"{given.folder}: its autoencoder has {few} channels, expected {LATENT_CHANNELS} or fewer")
    torch.manual_seed(0)
    vae, unet = make_vae(), make_unet()
    widen_vae(vae, had["vae"])
    widen_unet(unet, had["unet"])
    given.out.mkdir(parents=True, exist_ok=True)
    for name, module in (("vae", vae), ("unet", unet), ("text_encoder", had["text_encoder"])):
        write_flat(given.out, name, module)
        print(f"{name}: {parameter_count(module) / 1e6:.1f} million weights")
    figures = {"tiny": False, "scaling_factor": had["vae"].config.scaling_factor, "elapsed": {}}
    (given.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
