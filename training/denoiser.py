"""Phase 2: text encoder and UNet together, on latents made on the fly; and sampling."""

from typing import Any

import torch

from .clock import Clock, Phase
from .library import Library
from .models import make_scheduler
from .optim import Trainee
from .source import Ring, Source

DROP = 0.10  # share of captions replaced by the empty one, for guidance
WHOLE_ONLY = 600  # from this timestep on a plain caption always means a whole scene
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
OFFSET_NOISE = 0.04


def choose_tokens(
    library: Library, rows: dict[str, torch.Tensor], t: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Captions ``[B,77]`` int64: of the scene or of the detail. Crops at high noise always say so."""
    chance = torch.rand(2, len(t), generator=generator, device=t.device)
    local = rows["crop"] & ((t >= WHOLE_ONLY) | (chance[0] < 0.3))
    tokens = torch.where(local[:, None], library.details[rows["detail"]], library.tokens[rows["row"]])
    return torch.where((chance[1] < DROP)[:, None], library.empty[None], tokens).long()


class LatentSource:
    """Render, encode, keep in a ring."""

    def __init__(self, source: Source, vae: Any, scale: float, capacity: int):
        self.source, self.vae, self.scale = source, vae, scale
        first = self._make()
        count = len(first["latents"])
        self.ring = Ring(max(4, capacity // count) * count, **first)
        self.ring.add(**first)

    @torch.no_grad()
    def _make(self) -> dict[str, torch.Tensor]:
        batch = self.source.draw()
        images = batch.images.to(self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        latents = (posterior.sample().float() * self.scale).to(torch.float16)
        return {"latents": latents, "row": batch.row, "detail": batch.detail, "crop": batch.crop}

    def grow(self) -> None:
        """One more group."""
        self.ring.add(**self._make())


def train_denoiser(
    clock: Clock,
    trainee: Trainee,
    latents: LatentSource,
    library: Library,
    *,
    batch: int,
    peak_lr: float,
    fill: int,
    render_every: int = 1,
) -> None:
    """Train until the phase's budget is used: v-prediction with min-SNR weights.

    fill: groups rendered before the first step; then one more group every ``render_every`` steps.
    """
    phase = Phase(clock, "denoiser")
    if clock.done("denoiser"):
        return
    unet, text = trainee.modules["unet"].train(), trainee.modules["text_encoder"].train()
    device, generator = trainee.device, latents.source.generator
    alphas = make_scheduler().alphas_cumprod.to(device)
    for _ in range(fill):
        latents.grow()
    while phase.go():
        if phase.steps % render_every == 0:
            latents.grow()
        rows = latents.ring.sample(batch, generator)
        x = rows["latents"].float()
        t = torch.randint(1000, (batch,), generator=generator, device=device)
        tokens = choose_tokens(library, rows, t, generator)
        noise = torch.randn(x.shape, generator=generator, device=device)
        noise = noise + OFFSET_NOISE * torch.randn((batch, 4, 1, 1), generator=generator, device=device)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x
        noisy = noisy.to(trainee.dtype, memory_format=torch.channels_last)
        got = unet(noisy, t, text(tokens).last_hidden_state).sample
        snr = a / (1 - a)
        weight = snr.clamp(max=MIN_SNR) / (snr + 1)
        error = (got.float() - target) ** 2
        loss = (weight * error).mean() / 0.5
        trainee.step(loss, phase.lr(peak_lr, warmup=300))
        phase.tick(batch, loss=loss.detach(), v_mse=error.detach().mean())
    unet.eval()
    text.eval()


@torch.no_grad()
def sample(
    trainee: Trainee,
    vae: Any,
    library: Library,
    tokens: torch.Tensor,
    *,
    scale: float,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
    latent_size: int = 32,
) -> torch.Tensor:
    """Pictures ``[N,3,H,W]`` in [-1,1] for captions ``[N,77]``: DDIM, classifier-free guidance, EMA weights."""
    unet, text = trainee.ema["unet"], trainee.ema["text_encoder"]
    scheduler: Any = make_scheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(tokens), 4, latent_size, latent_size, generator=generator).to(trainee.device)
    states = text(tokens.long()).last_hidden_state
    blank = text(library.empty[None].long()).last_hidden_state.expand_as(states)
    both = torch.cat([blank, states])
    for t in scheduler.timesteps:
        v0, v1 = unet(torch.cat([x, x]), t.to(trainee.device), both).sample.chunk(2)
        x = scheduler.step(v0 + guidance * (v1 - v0), t, x).prev_sample
    return torch.cat([vae.decode(z).sample for z in (x / scale).split(16)]).clamp(-1, 1)
