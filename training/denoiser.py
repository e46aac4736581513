"""Phase 2: text encoder and UNet together, on latents made on the fly; and sampling."""

import time
from collections.abc import Callable
from typing import Any

import torch

from .clock import Clock, Phase
from .library import Library
from .models import LATENT_CHANNELS, make_scheduler
from .optim import Trainee
from .source import Ring, Source

DROP = 0.10  # share of captions replaced by the empty one, for guidance
WHOLE_ONLY = 600  # from this timestep on every picture is a whole scene: layouts are learned from whole scenes alone
CROPS = 0.4  # share of groups that are crops
SNR_HALF = 40.0  # signal-to-noise ratio at which an error in v counts half
LEAST_WEIGHT = 0.5  # of low noise, where plain min-SNR (Hang et al. 2023) would count nearly nothing
OFFSET_NOISE = 0.04
GUIDANCE = 4.0  # of samples, as in the default run


def choose_tokens(library: Library, rows: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Captions ``[B,77]`` int64: of the scene, or (three crops in ten) of what shows; one in ten says nothing."""
    crop = rows["crop"]
    chance = torch.rand(2, len(crop), generator=generator, device=crop.device)
    local = crop & (chance[0] < 0.3)
    tokens = torch.where(local[:, None], library.details[rows["detail"]], library.tokens[rows["row"]])
    return torch.where((chance[1] < DROP)[:, None], library.empty[None], tokens).long()


def choose_timesteps(crop: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Timesteps ``[B]``, evenly spread over the batch; those of crops (``[B]`` bool) lie below ``WHOLE_ONLY``."""
    count = len(crop)
    place = torch.randperm(count, generator=generator, device=crop.device)
    share = (place + torch.rand(count, generator=generator, device=crop.device)) / count
    return (share * torch.where(crop, WHOLE_ONLY, 1000)).long().clamp(max=999)


def loss_weight(alphas: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error in v where ``alphas`` of the variance is signal: 1 in pure noise."""
    snr = alphas / (1 - alphas)
    return (SNR_HALF / (SNR_HALF + snr)).clamp(min=LEAST_WEIGHT)


class LatentSource:
    """Render, encode with the mirrored pictures, keep in a ring."""

    def __init__(self, source: Source, vae: Any, scale: float, capacity: int):
        self.source, self.vae, self.scale = source, vae, scale
        first = self.make()
        count = len(first["latents"])
        self.ring = Ring(max(4, capacity // count) * count, **first)
        self.ring.add(**first)

    @torch.no_grad()
    def make(self, crops: bool | None = None) -> dict[str, torch.Tensor]:
        """Rows of one group: scenes, then their mirror images, which no caption tells apart."""
        batch = self.source.draw(self.source.rng.random() < CROPS if crops is None else crops)
        images = torch.cat([batch.images, batch.images.flip(-1)])
        images = images.to(self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        latents = (posterior.sample().float() * self.scale).to(torch.float16)
        about = {"row": batch.row, "detail": batch.detail, "crop": batch.crop}
        return {"latents": latents} | {k: v.repeat(2) for k, v in about.items()}

    def grow(self) -> None:
        """One more group."""
        self.ring.add(**self.make())


def train_denoiser(
    clock: Clock,
    trainee: Trainee,
    latents: LatentSource,
    library: Library,
    *,
    batch: int,
    peak_lr: float,
    fill: int,
    render_every: int,
    finish: bool,
    compiled: bool,
    keep: Callable[[], None],
    keep_every: float,
) -> None:
    """Train until the phase's budget is used.

    fill: groups rendered before the first step; then one more group every ``render_every`` steps. keep: called every
    ``keep_every`` seconds, so that a machine that is lost does not take all with it.
    """
    unet, text = trainee.modules["unet"].train(), trainee.modules["text_encoder"].train()
    device, generator = trainee.device, latents.source.generator
    alphas = make_scheduler().alphas_cumprod.to(device)
    weights = loss_weight(alphas) / loss_weight(alphas).mean()
    for _ in range(fill):
        latents.grow()
    predict: Any = torch.compile(unet, dynamic=False) if compiled else unet

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        rows = latents.ring.sample(batch, generator)
        x, t = rows["latents"].float(), choose_timesteps(rows["crop"], generator)
        noise = torch.randn(x.shape, generator=generator, device=device)
        shift = torch.randn((*x.shape[:2], 1, 1), generator=generator, device=device)
        noise = noise + OFFSET_NOISE * shift
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x
        noisy = noisy.to(trainee.dtype).contiguous(memory_format=torch.channels_last)
        states = text(choose_tokens(library, rows, generator)).last_hidden_state
        error = (predict(noisy, t, states).sample.float() - target).square().mean((1, 2, 3))
        return (weights[t] * error).mean(), error.detach().mean()

    if compiled:  # before the clock of the phase starts
        losses()[0].backward()
        trainee.forget()
    phase, due = Phase(clock, "denoiser", finish=finish), time.monotonic() + keep_every
    while phase.go():
        if phase.steps % render_every == 0:
            latents.grow()
        loss, v_mse = losses()
        trainee.step(loss, phase.lr(peak_lr, warmup=300))
        phase.tick(batch, loss=loss.detach(), v_mse=v_mse)
        if time.monotonic() > due:
            keep()
            due = time.monotonic() + keep_every
    unet.eval()
    text.eval()


@torch.no_grad()
def measure_denoiser(trainee: Trainee, held_out: LatentSource, rounds: int) -> dict[str, float]:
    """Mean squared error in v of the averaged weights on whole scenes never trained on, captions said, noise fixed:
    over all timesteps, and of each quarter of them from low noise to high."""
    unet, text, library = trainee.ema["unet"], trainee.ema["text_encoder"], held_out.source.library
    alphas = make_scheduler().alphas_cumprod.to(trainee.device)
    generator = torch.Generator(device=trainee.device).manual_seed(5)
    errors: list[list[torch.Tensor]] = [[], [], [], []]
    for _ in range(rounds):
        rows = held_out.make(crops=False)
        x = rows["latents"].float()
        states = text(library.tokens[rows["row"]].long()).last_hidden_state
        for quarter, found in enumerate(errors):
            t = torch.randint(250, (len(x),), generator=generator, device=trainee.device) + 250 * quarter
            noise = torch.randn(x.shape, generator=generator, device=trainee.device)
            a = alphas[t].view(-1, 1, 1, 1)
            got = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, states).sample
            found.append((got - (a.sqrt() * noise - (1 - a).sqrt() * x)).square().mean())
    quarters = [torch.stack(found).mean().item() for found in errors]
    return {"held_v_mse": sum(quarters) / 4} | {f"held_v_mse_{i}": q for i, q in enumerate(quarters)}


@torch.no_grad()
def denoised(
    unet: Any, text: Any, library: Library, tokens: torch.Tensor, x: torch.Tensor, scheduler: Any, guidance: float
) -> torch.Tensor:
    """Scaled latents ``[N,C,h,w]`` of captions ``[N,77]`` from noise ``x``, by classifier-free guidance.

    scheduler: of diffusers, its steps set.
    """
    states = text(tokens.long()).last_hidden_state
    blank = text(library.empty[None].long()).last_hidden_state.expand_as(states)
    both = torch.cat([blank, states])
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        v0, v1 = unet(torch.cat([x, x]), t.to(x.device), both).sample.chunk(2)
        x = scheduler.step(v0 + guidance * (v1 - v0), t, x).prev_sample
    return x


@torch.no_grad()
def sample(
    trainee: Trainee,
    vae: Any,
    library: Library,
    tokens: torch.Tensor,
    *,
    scale: float,
    steps: int = 25,
    guidance: float = GUIDANCE,
    seed: int = 0,
    latent_size: int = 32,
) -> torch.Tensor:
    """Pictures ``[N,3,H,W]`` in [-1,1] for captions ``[N,77]``: DDIM, classifier-free guidance, EMA weights."""
    scheduler: Any = make_scheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(tokens), LATENT_CHANNELS, latent_size, latent_size, generator=generator).to(trainee.device)
    x = denoised(trainee.ema["unet"], trainee.ema["text_encoder"], library, tokens, x, scheduler, guidance)
    return torch.cat([vae.decode(z).sample for z in (x / scale).split(16)]).clamp(-1, 1)
