"""Polish the shipped autoencoder's decoder: ``python -m training.polish --out DIR``, five minutes on a GPU.

A small convolutional decoder draws steps between the 8-pixel squares of neighbouring latents a little steeper than
steps within them: a lattice, and tile borders lie on its lines. This goes on from the shipped decoder with a term that
asks for the scene's own steepness on every line, whatever its place in the square. Every other step decodes canvases
of 512 or 1024 pixels as a whole, half of them encoded twice: normalised over a large canvas, and after each upscaling
phase, colours must come back as they were. The encoder stays as it is, so that latents, and the denoiser that was
trained on them, stay valid.

``--perceptual``: pictures are also asked to look like the scenes to networks that know photographs
(``pip install -e .[training]``); ``--frechet``: and pictures of what the denoiser makes, which have no scene of their
own, to be all together as scenes are to them.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from .autoencoder import measure_autoencoder, pack, unpack
from .clock import Clock, Phase
from .frechet import Frechet, sampled_latents
from .library import Library
from .losses import FACTOR, colour_loss, lattice_loss, reconstruction_loss, steepness, texture_loss
from .models import MODEL, halves, save_halves
from .optim import Trainee
from .perceptual import Balance, Perceptual
from .source import Ring, Source
from .train import HELD_OUT

CANVAS_GROUP = 16  # scenes of a group of canvases
OTHER_SPECS, OTHERS = 4, 8  # for `--frechet`: specs for each of `--groups`, and scenes of each spec


class Canvases:
    """Scenes on canvases of two and four times the native size, as a picture on its way up has; the newest ``pool``."""

    def __init__(self, source: Source, pool: int) -> None:
        library = Library.make(len(source.library.specs), CANVAS_GROUP, source.rng.randrange(2**31), source.device)
        seeds = [source.rng.randrange(2**31) for _ in range(2)]
        self.rng, self.native = source.rng, source.size
        self.sources = [
            Source(library, source.device, seed, size=n * source.size) for n, seed in zip((2, 4), seeds, strict=True)
        ]
        self.rings = []
        for one in self.sources:
            first = pack(one.draw(crops=False).images)
            self.rings.append(Ring(max(1, pool // len(first)) * len(first), images=first))
            self.rings[-1].add(images=first)

    def sample(self, batch: int) -> torch.Tensor:
        """``[B,3,s,s]`` uint8 of one side, with a quarter of the pixels of ``batch`` native ones."""
        index = self.rng.randrange(len(self.sources))
        source, ring = self.sources[index], self.rings[index]
        if self.rng.random() < 0.2:
            ring.add(images=pack(source.draw(crops=self.rng.random() < 0.3).images))
        count = batch * self.native**2 // source.size**2 // 4
        return ring.sample(max(1, count), source.generator)["images"]


def polish(
    vae: Any,
    source: Source,
    *,
    seconds: float,
    batch: int,
    peak_lr: float,
    weight: float,
    texture: float,
    pool: int,
    noise: float,
    large: float,
    reach: float = 1.0,
    origin: Any = None,
    perceptual: Perceptual | None = None,
    perceptual_share: float = 0.0,
    frechet: Frechet | None = None,
    frechet_share: float = 0.0,
) -> Any:
    """Train the decoder for so long; returns ``vae`` with the averaged decoder, its encoder untouched.

    weight, texture: of the term against the lattice, and of the one that asks for texture. noise: what latents get of
    it at most, in their standard deviations. large: share of steps on canvases. reach: how far weights go from those
    of ``origin`` (another autoencoder; ``vae`` where there is none) to what was learned, 1 to its end. perceptual: a
    distance that is asked for too; its share: of the gradient of pixels. frechet: another, of a third as many pictures
    as ``batch``; its share: of the gradient of all else in the last convolution.
    """
    device = source.device
    polished, vae = vae, copy.deepcopy(vae).train()
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    trainee = Trainee(modules, device=device, decay=0.999)
    vae.encoder.to(trainee.dtype).requires_grad_(False)
    vae.quant_conv.to(trainee.dtype).requires_grad_(False)
    first = source.draw()
    ring = Ring(max(2, pool // len(first.images)) * len(first.images), images=pack(first.images))
    for crops in (False, True) * 8:
        ring.add(images=pack(source.draw(crops).images))
    size, std = source.size, 1 / vae.config.scaling_factor
    canvases = Canvases(source, pool // 48)

    def patches(share: float) -> torch.Tensor:
        if source.rng.random() < 0.2:
            ring.add(images=pack(source.draw().images))
        images = ring.sample(batch, source.generator)["images"]
        if share >= 0.75:
            return images[: max(1, batch // 4)]
        top, left = (FACTOR * source.rng.randint(0, size // 16) for _ in range(2))
        return images[..., top : top + size // 2, left : left + size // 2]

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(trainee.dtype) * std).sample.float().clamp(-1, 1)

    if frechet is not None:
        frechet.begin(decoded)
    balance, together = Balance(perceptual_share), Balance(frechet_share)
    phase = Phase(Clock({"decoder": seconds}, {}, seconds), "decoder")
    while phase.go():
        canvas = source.rng.random() < large
        images = canvases.sample(batch) if canvas else patches(phase.share)
        images = unpack(images).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images.to(trainee.dtype)).latent_dist.mode().float()
            if canvas and source.rng.random() < 0.5:
                again = vae.decode(latents.to(trainee.dtype)).sample
                latents = vae.encode(again).latent_dist.mode().float()
            much = torch.rand(len(latents), 1, 1, 1, generator=source.generator, device=device) ** 2
            latents = latents + noise * std * much * torch.randn_like(latents)
        got = vae.decode(latents.to(trainee.dtype)).sample.float()
        lattice = lattice_loss(got, images)
        loss = reconstruction_loss(got, images) + 2.0 * colour_loss(got, images)
        loss = loss + texture * texture_loss(got, images)
        said = {"loss": loss.detach(), "lattice": lattice.detach()}
        if perceptual is not None:
            unlike = perceptual(got, images, source.rng)
            loss, said["unlike"] = loss + balance(unlike, loss, got) * unlike, unlike.detach()
        loss = loss + weight * lattice
        if frechet is not None:
            apart = frechet(decoded, max(2, batch // 3))
            loss = loss + together(apart, loss, vae.decoder.conv_out.weight) * apart
            said["apart"] = torch.tensor(frechet.value)
        trainee.step(loss, phase.lr(peak_lr, warmup=100))
        phase.tick(len(images), **said)
    with torch.no_grad():
        for name, module in trainee.ema.items():
            mine = getattr(polished, name).parameters()
            begun = getattr(origin or polished, name).parameters()
            for ours, first, learned in zip(mine, begun, module.parameters(), strict=True):
                ours.copy_(first.to(ours.device).lerp(learned, reach))
    return polished


@torch.no_grad()
def lattice(vae: Any, source: Source, rounds: int) -> float:
    """Steepness between latents / elsewhere in decoded held-out scenes, over the same of the scenes (1: no lattice)."""
    got, want = [], []
    for i in range(rounds):
        for images in source.draw(crops=i % 2 == 1).images.split(16):
            got.append(steepness(vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)))
            want.append(steepness(images))
    share = torch.stack(got).mean(0) / torch.stack(want).mean(0)
    return (share[:, 0].mean() / share[:, 1:].mean()).item()


@torch.no_grad()
def drift(vae: Any, source: Source, rounds: int, trips: int = 3) -> float:
    """How far colours of areas (``colour_loss``, of a range of 2) are off after ``trips`` through the autoencoder."""
    found = []
    for _ in range(rounds):
        for images in source.draw(crops=False).images.split(1):
            got = images
            for _ in range(trips):
                got = vae.decode(vae.encode(got).latent_dist.mode()).sample.clamp(-1, 1)
            found.append(colour_loss(got, images).item())
    return sum(found) / len(found)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for vae.safetensors (fp16) and polish.json")
    parser.add_argument("--model", type=Path, default=MODEL, help="diffusers folder to go on from")
    parser.add_argument("--minutes", type=float, default=4.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight", type=float, default=0.3, help="of the lattice term")
    parser.add_argument("--texture", type=float, default=0.2, help="weight of the texture term")
    parser.add_argument("--noise", type=float, default=0.15, help="of latents, in their standard deviations, at most")
    parser.add_argument("--large", type=float, default=0.5, help="share of steps on canvases of 512 and 1024 pixels")
    parser.add_argument("--reach", type=float, default=1.0, help="how far along what was learned; above 1: beyond it")
    parser.add_argument("--origin", type=Path, help="diffusers folder that reach counts from, if it is not the model's")
    parser.add_argument("--perceptual", type=float, default=0.0, help="its share of the gradient that pixels have")
    parser.add_argument("--frechet", type=float, default=0.0, help="its share of the gradient that all else has")
    parser.add_argument("--sampled", type=int, default=4096, help="latents that the denoiser makes for it")
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--per-group", type=int, default=64)
    parser.add_argument("--held-groups", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pool", type=int, default=12288)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    began, device = time.monotonic(), torch.device(given.device)
    torch.manual_seed(given.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    looks = Perceptual(device, dtype) if given.perceptual or given.frechet else None
    vae: Any = AutoencoderKL.from_pretrained(given.model, subfolder="vae", torch_dtype=torch.float32)
    vae = vae.to(device, memory_format=torch.channels_last)
    origin: Any = given.origin and AutoencoderKL.from_pretrained(
        given.origin, subfolder="vae", torch_dtype=torch.float32
    )
    library = Library.make(given.groups, given.per_group, given.seed + 101, device)
    source = Source(library, device, given.seed + 102, size=given.size)

    def figures(model: Any) -> dict[str, float]:
        held = Library.make(given.held_groups, 8, given.seed + 7919, device)
        scenes = [Source(held, device, 99, size=given.size, seed_base=HELD_OUT) for _ in range(2)]
        measured = measure_autoencoder(model, scenes[0], given.held_groups)
        large = Library.make(given.held_groups, 1, given.seed + 7919, device)
        canvases = Source(large, device, 99, size=4 * given.size, seed_base=HELD_OUT)
        rounds = given.held_groups
        found = {"lattice": lattice(model, scenes[1], rounds), "drift": drift(model, canvases, min(8, rounds))}
        return measured | found

    frechet = None
    if looks is not None and given.frechet:
        others = Library.make(OTHER_SPECS * given.groups, OTHERS, given.seed + 105, device)
        latents = sampled_latents(given.model, others, given.sampled, device, given.seed + 103)
        drawn = Source(others, device, given.seed + 104, size=given.size)
        scenes = (drawn.draw(crops=False).images for _ in others.specs)
        frechet = Frechet(looks.networks, dtype, scenes, latents, drawn.rng)
        print(f"{given.sampled} samples, {time.monotonic() - began:.0f} s", flush=True)
    result: dict[str, Any] = {"before": figures(vae.eval())}
    print("before", result["before"], flush=True)
    vae = polish(
        vae,
        source,
        seconds=60 * given.minutes,
        batch=given.batch,
        peak_lr=given.lr,
        weight=given.weight,
        texture=given.texture,
        pool=given.pool,
        noise=given.noise,
        large=given.large,
        reach=given.reach,
        origin=origin,
        perceptual=looks if given.perceptual else None,
        perceptual_share=given.perceptual,
        frechet=frechet,
        frechet_share=given.frechet,
    )
    result |= {"after": figures(vae), "seconds": time.monotonic() - began}
    print("after", result["after"], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    save_halves(halves(vae), given.out / "vae.safetensors")
    (given.out / "polish.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
