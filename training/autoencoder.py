"""Phase 1: the autoencoder."""

from typing import Any

import torch

from .clock import Clock, Phase
from .losses import laplacian, lattice_loss, reconstruction_loss, texture_loss
from .optim import Trainee
from .source import Ring, Source

KL_WEIGHT = 1e-4
TEXTURE_FROM = 0.4  # share of the phase at which the weight of the texture term is reached: shapes come first
LATTICE_WEIGHT = 0.05
ANCHOR_WEIGHT = 0.03


def _loss(
    vae: Any, images: torch.Tensor, weight: torch.Tensor, anchor: Any | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch, and its part that asks for the scenes' texture, whose weight is given.

    anchor: an autoencoder of fewer channels or as many, whose latents the first channels are to keep.
    """
    dtype = vae.quant_conv.weight.dtype
    moments = vae.quant_conv(vae.encoder(images.to(dtype))).float()
    mean, logvar = moments.chunk(2, 1)
    logvar = logvar.clamp(-30, 20)
    latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    got = vae.decoder(vae.post_quant_conv(latents.to(dtype))).float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    texture = texture_loss(got, images)
    loss = reconstruction_loss(got, images) + weight * texture + LATTICE_WEIGHT * lattice_loss(got, images)
    loss = loss + KL_WEIGHT * kl
    if anchor is not None:
        with torch.no_grad():
            kept = anchor.quant_conv(anchor.encoder(images.to(dtype))).float().chunk(2, 1)[0]
        loss = loss + ANCHOR_WEIGHT * (mean[:, : kept.shape[1]] - kept).square().mean()
    return loss, texture


def train_autoencoder(
    clock: Clock,
    trainee: Trainee,
    source: Source,
    *,
    batch: int,
    peak_lr: float,
    texture: float,
    fill: int,
    pool: int,
    render_every: int,
    finish: bool,
    compiled: bool,
    anchor: Any | None = None,
) -> None:
    """Train until the phase's budget is used: 128-pixel patches first, whole pictures for the last quarter.

    fill: groups rendered before the first step; then one more every ``render_every`` steps, the newest ``pool``
    pictures are kept. texture: weight of the term that asks for it. anchor: see ``_loss``.
    """
    vae: Any = trainee.modules["vae"].train()
    first = source.draw(crops=False)
    ring = Ring(max(2, pool // len(first.images)) * len(first.images), images=pack(first.images))
    for _ in range(max(2, fill)):
        ring.add(images=pack(source.draw().images))
    size, loss_of = source.size, torch.compile(_loss, dynamic=False) if compiled else _loss

    def images_for(whole: bool) -> torch.Tensor:
        images = ring.sample(max(1, batch // 4) if whole else batch, source.generator)["images"]
        if not whole:
            top, left = (8 * source.rng.randint(0, size // 16) for _ in range(2))
            images = images[..., top : top + size // 2, left : left + size // 2]
        return unpack(images).contiguous(memory_format=torch.channels_last)

    if compiled:
        for whole in (False, True):
            loss_of(vae, images_for(whole), torch.zeros((), device=trainee.device), anchor)[0].backward()
        trainee.forget()
    phase = Phase(clock, "vae", finish=finish)
    while phase.go():
        if phase.steps % render_every == 0:
            ring.add(images=pack(source.draw().images))
        images = images_for(phase.share > 0.75)
        ripe = 1.0 if anchor is not None else min(1.0, phase.share / TEXTURE_FROM)
        weight = torch.full((), texture * ripe, device=trainee.device)
        loss, grain = loss_of(vae, images, weight, anchor)
        trainee.step(loss, phase.lr(peak_lr, warmup=200))
        phase.tick(len(images), loss=loss.detach(), texture=grain.detach())
    vae.eval()


def pack(images: torch.Tensor) -> torch.Tensor:
    """[-1,1] to bytes."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def unpack(images: torch.Tensor) -> torch.Tensor:
    """Bytes to [-1,1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def measure_autoencoder(vae: Any, source: Source, rounds: int) -> dict[str, float]:
    """Of an AutoencoderKL on scenes never trained on: mean PSNR in dB (range 2) of whole scenes and crops, each half
    of the pictures, and of both; the share of the scenes' Laplacian energy in what comes back; latents' std."""
    psnr: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    energy = {False: [0.0, 0.0], True: [0.0, 0.0]}
    latents = []
    for i in range(max(2, rounds)):
        crops = i % 2 == 1
        for images in source.draw(crops).images.split(16):
            z = vae.encode(images).latent_dist.mode()
            back = vae.decode(z).sample.clamp(-1, 1)
            psnr[crops].append(10 * torch.log10(4.0 / ((back - images) ** 2).mean((1, 2, 3))))
            for j, x in enumerate((back, images)):
                energy[crops][j] += laplacian(x).square().mean().item() * len(images)
            latents.append(z)
    every = torch.cat(psnr[False] + psnr[True])
    return {
        "vae_psnr": every.mean().item(),
        "vae_psnr_worst": every.min().item(),
        "vae_psnr_whole": torch.cat(psnr[False]).mean().item(),
        "vae_psnr_crops": torch.cat(psnr[True]).mean().item(),
        "vae_laplacian_whole": energy[False][0] / energy[False][1],
        "vae_laplacian_crops": energy[True][0] / energy[True][1],
        "latent_std": torch.cat(latents).std().item(),
    }
