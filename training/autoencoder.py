"""Phase 1: the autoencoder."""

from typing import Any

import torch
import torch.nn.functional as F

from .clock import Clock, Phase
from .optim import Trainee
from .source import Ring, Source

KL_WEIGHT = 1e-4


def reconstruction_loss(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """L1, a squared term for PSNR, and L1 of finite differences at three scales, which keeps edges crisp."""
    loss = F.l1_loss(got, want) + 2.0 * F.mse_loss(got, want)
    for scale in range(3):
        if scale:
            got, want = F.avg_pool2d(got, 2), F.avg_pool2d(want, 2)
        dx = (got[..., 1:] - got[..., :-1]) - (want[..., 1:] - want[..., :-1])
        dy = (got[..., 1:, :] - got[..., :-1, :]) - (want[..., 1:, :] - want[..., :-1, :])
        loss = loss + 0.5 * (dx.abs().mean() + dy.abs().mean())
    return loss


def train_autoencoder(clock: Clock, trainee: Trainee, source: Source, *, batch: int, peak_lr: float) -> None:
    """Train until the phase's budget is used: 128-pixel patches first, whole pictures for the last quarter."""
    phase = Phase(clock, "vae")
    if clock.done("vae"):
        return
    vae: Any = trainee.modules["vae"].train()
    first = source.draw()
    ring = Ring(max(4, 12288 // len(first.images)) * len(first.images), images=_pack(first.images))
    for crops in (False, True) * 8:
        ring.add(images=_pack(source.draw(crops).images))
    size = source.size
    while phase.go():
        ring.add(images=_pack(source.draw().images))
        whole = phase.share > 0.75
        images = ring.sample(max(1, batch // 4) if whole else batch, source.generator)["images"]
        if not whole:
            top, left = (8 * source.rng.randint(0, size // 16) for _ in range(2))
            images = images[..., top : top + size // 2, left : left + size // 2]
        images = _unpack(images).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images.to(trainee.dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        got = vae.decode(latents.to(trainee.dtype)).sample
        loss = reconstruction_loss(got.float(), images)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        trainee.step(loss + KL_WEIGHT * kl, phase.lr(peak_lr, warmup=100))
        phase.tick(len(images), loss=loss.detach(), kl=kl.detach())
    vae.eval()


def _pack(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def _unpack(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def measure_autoencoder(vae: Any, source: Source, rounds: int) -> dict[str, float]:
    """Of an AutoencoderKL on scenes never trained on, half of them crops: mean PSNR in dB (range 2), latents' std."""
    psnr, latents = [], []
    for i in range(rounds):
        for images in source.draw(crops=i % 2 == 1).images.split(16):
            z = vae.encode(images).latent_dist.mode()
            error = ((vae.decode(z).sample.clamp(-1, 1) - images) ** 2).mean((1, 2, 3))
            psnr.append(10 * torch.log10(4.0 / error))
            latents.append(z)
    return {
        "vae_psnr": torch.cat(psnr).mean().item(),
        "vae_psnr_worst": torch.cat(psnr).min().item(),
        "latent_std": torch.cat(latents).std().item(),
    }
