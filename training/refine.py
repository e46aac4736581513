"""Refine the shipped classifier on the CPU: ``python -m training.refine``, about eight minutes on two cores.

The classifier of a training run has seen whole scenes for seconds only and mixes up subjects. This goes on from its
weights with rendered whole scenes in which every subject is equally frequent, a quarter of them through the embedded
autoencoder. It sees rendered scenes only: never a generated picture, never a prompt.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .classifier import ATTRIBUTES, INPUT_SIZE, WEIGHTS, Classifier, load_classifier
from .library import labels
from .models import MODEL, NATIVE_SIZE, halves, save_halves
from .scenes import Spec, View, render
from .specs import COLOURS, SUBJECTS, sample_spec
from .train import HELD_OUT

PER_SPEC = 2
SHARE_DECODED = 0.25


def spec_of(rng: random.Random, subject: str) -> Spec:
    """A plausible spec with this subject."""
    while (spec := sample_spec(rng)).subject != subject:
        pass
    return spec


@torch.no_grad()
def picture(spec: Spec, seeds: torch.Tensor, colours: torch.Tensor, vae: Any | None) -> torch.Tensor:
    """Whole scenes ``[B,3,S,S]`` uint8, S the classifier's input; ``vae``: as this autoencoder returns them."""
    if vae is None:
        images, _ = render(spec, seeds, colours, View.whole(len(seeds), size=INPUT_SIZE))
    else:
        images, _ = render(spec, seeds, colours, View.whole(len(seeds), size=NATIVE_SIZE))
        images = vae.decode(vae.encode(images).latent_dist.mode()).sample
        images = F.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def scenes(seconds: float, seed: int, vae: Any | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Render for so long: pictures ``[N,3,S,S]`` uint8, labels ``[N,3]``; each subject in turn."""
    rng = random.Random(seed)
    images, targets = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(images) < len(SUBJECTS):
        spec = spec_of(rng, SUBJECTS[len(images) % len(SUBJECTS)])
        seeds = torch.tensor([rng.randrange(HELD_OUT) for _ in range(PER_SPEC)])
        colours = torch.tensor([rng.randrange(len(COLOURS)) for _ in range(PER_SPEC)])
        images.append(picture(spec, seeds, colours, vae if rng.random() < SHARE_DECODED else None))
        targets.append(torch.tensor(labels(spec)).expand(PER_SPEC, 3))
    return torch.cat(images), torch.cat(targets)


def vary(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1,1] with mirrors, small shifts, gains and noise."""
    images = images.float() / 127.5 - 1
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    top, left = torch.randint(0, 13, (2,)).tolist()
    images = F.pad(images, (6, 6, 6, 6), mode="replicate")[..., top : top + INPUT_SIZE, left : left + INPUT_SIZE]
    gain = 1 + 0.1 * (torch.rand(len(images), 3, 1, 1) - 0.5)
    return images * gain + torch.randn_like(images) * 0.04 * torch.rand(len(images), 1, 1, 1)


def refine(
    model: Classifier, images: torch.Tensor, targets: torch.Tensor, *, seconds: float, batch: int, peak_lr: float
) -> Classifier:
    """Train for so long; returns the average of the last weights (EMA)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.02)
    average: Any = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    model.train()
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 20, 0.02 + 1.3 * (1 - share))
        rows = torch.randint(len(images), (batch,))
        logits = model(vary(images[rows]))
        losses = [
            weight * F.cross_entropy(out, targets[rows, i], label_smoothing=0.02)
            for i, (out, weight) in enumerate(zip(logits.values(), (0.5, 2.0, 1.0), strict=True))
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 20 == 0:
            said = " ".join(f"{float(x.detach()):.3f}" for x in losses)
            print(f"step {step}  {said}  {share:.0%}", flush=True)
        step += 1
    return average.module.eval()


@torch.no_grad()
def accuracy(model: Classifier, specs: Sequence[Spec], seed: int = 5) -> dict[str, float]:
    """Share right for each attribute on held-out scenes, two of each spec; a plain mean over the scenes."""
    rng, right = random.Random(seed), Counter()
    for spec in specs:
        seeds = torch.tensor([HELD_OUT + rng.randrange(HELD_OUT) for _ in range(PER_SPEC)])
        colours = torch.tensor([rng.randrange(len(COLOURS)) for _ in range(PER_SPEC)])
        out = model(picture(spec, seeds, colours, None).float() / 127.5 - 1)
        for i, name in enumerate(ATTRIBUTES):
            right[name] += int((out[name].argmax(1) == labels(spec)[i]).sum())
    return {name: round(right[name] / (PER_SPEC * len(specs)), 4) for name in ATTRIBUTES}


def main() -> None:
    """Command line."""
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render-minutes", type=float, default=4.0)
    parser.add_argument("--train-minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae: Any = AutoencoderKL.from_pretrained(MODEL, subfolder="vae", torch_dtype=torch.float32).eval()
    rng = random.Random(7919)
    held = [sample_spec(rng) for _ in range(100)]
    model = load_classifier()
    print("before", accuracy(model, held), flush=True)
    images, targets = scenes(60 * options.render_minutes, options.seed, vae)
    print(f"{len(images)} scenes", flush=True)
    model = refine(model, images, targets, seconds=60 * options.train_minutes, batch=options.batch, peak_lr=options.lr)
    print("after", accuracy(model, held), flush=True)
    save_halves(halves(model), options.out)


if __name__ == "__main__":
    main()
