"""Phase 3: training the classifier on rendered scenes, as they are and as the autoencoder returns them."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from .clock import Clock, Phase
from .library import labels
from .optim import Trainee
from .scenes import MATERIALS
from .scenes.canvas import MATERIAL_INDEX
from .source import Batch, Ring, Source
from .specs import SETTINGS, SUBJECTS

# settings that only show through one material: what to ask of a crop before its label counts
_NEEDED = {"cliff": "cliff", "beach": "sand", "sea": "water", "lake": "water"}


@lru_cache(maxsize=4)
def _material_of(device: str) -> torch.Tensor:
    """Material id of each subject, 255 for none."""
    return torch.tensor([MATERIAL_INDEX.get(name, 255) for name in SUBJECTS], device=device)


def _rows(batch: Batch, vae: Any) -> dict[str, torch.Tensor]:
    """Rows of the ring: the pictures, half of them through the autoencoder, coarse ids, labels."""
    images = batch.images
    half = len(images) // 2
    with torch.no_grad():
        back = vae.decode(vae.encode(images[:half].to(vae.dtype)).latent_dist.mode()).sample
    images = torch.cat([back.float(), images[half:]])
    target = torch.tensor(labels(batch.spec)).expand(len(images), 3).to(images.device, non_blocking=True)
    size = (images.shape[-1] * 3 // 4,) * 2  # of pictures of 256 pixels what the classifier looks at
    small = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    ids = F.interpolate(batch.ids[:, None].float(), size, mode="nearest")[:, 0].byte()
    return {"images": ((small + 1) * 127.5).round().clamp(0, 255).byte(), "ids": ids, "target": target}


def _crop(rows: dict[str, torch.Tensor], source: Source) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the same random window (often the whole, often half the width) out of a batch; what no longer shows is
    not asked for: returns images in [-1,1], targets, weights ``[B,3]``."""
    size = rows["images"].shape[-1]
    rng = source.rng
    if rng.random() < 0.4:
        top, left, height, width = 0, 0, size, size
    else:
        width = round(size * rng.uniform(0.45, 1.0))
        height = round(size * rng.uniform(0.8, 1.0))
        top, left = rng.randint(0, size - height), rng.randint(0, size - width)
    window = (..., slice(top, top + height), slice(left, left + width))
    images, ids = rows["images"][window].float() / 127.5 - 1, rows["ids"][window].flatten(1)
    target = rows["target"].clone()
    full = rows["ids"].flatten(1)
    material = _material_of(str(ids.device))[target[:, 1]]
    before = (full == material[:, None]).sum(1)
    after = (ids == material[:, None]).sum(1)
    kept = after / before.clamp(min=1)
    target[:, 1] = torch.where(after == 0, 0, target[:, 1])
    weight = torch.ones(len(images), 3, device=images.device)
    weight[:, 1] = ((kept > 0.6) | (after == 0)).float()
    for setting, name in _NEEDED.items():
        shown = (ids == MATERIALS.index(name)).float().mean(1)
        weight[:, 2] *= 1 - ((target[:, 2] == SETTINGS.index(setting)) & (shown < 0.05)).float()
    noise = torch.randn(images.shape, generator=source.generator, device=images.device) * rng.uniform(0, 0.05)
    gain = 1 + 0.08 * (torch.rand((len(images), 3, 1, 1), generator=source.generator, device=images.device) - 0.5)
    images = (images + noise) * gain
    if rng.random() < 0.3:
        images = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images, target, weight


def train_classifier(
    clock: Clock, trainee: Trainee, vae: Any, source: Source, *, batch: int, peak_lr: float, fill: int
) -> None:
    """Train until the phase's budget is used."""
    model = trainee.modules["classifier"].train()
    first = _rows(source.draw(crops=False), vae)
    count = len(first["images"])
    ring = Ring(max(4, 32768 // count) * count, **first)
    for _ in range(fill):
        ring.add(**_rows(source.draw(crops=False), vae))
    phase = Phase(clock, "classifier")
    while phase.go():
        ring.add(**_rows(source.draw(crops=False), vae))
        for _ in range(6):
            images, target, weight = _crop(ring.sample(batch, source.generator), source)
            logits = model(images)
            losses = [
                F.cross_entropy(out.float(), target[:, i], reduction="none", label_smoothing=0.02)
                for i, out in enumerate(logits.values())
            ]
            loss = (torch.stack(losses, 1) * weight).mean()
            trainee.step(loss, phase.lr(peak_lr, warmup=100))
            phase.tick(len(images), loss=loss.detach())
    model.eval()


@torch.no_grad()
def measure_classifier(trainee: Trainee, source: Source, rounds: int) -> dict[str, float]:
    """Accuracy for each attribute on held-out whole scenes."""
    right = torch.zeros(3, device=trainee.device)
    total = 0
    for _ in range(rounds):
        batch = source.draw(crops=False)
        logits = trainee.ema["classifier"](batch.images)
        want = labels(batch.spec)
        right += torch.stack([(out.argmax(1) == want[i]).sum() for i, out in enumerate(logits.values())])
        total += len(batch.images)
    return {
        f"classifier_{name}": round(r / total, 4)
        for name, r in zip(("time", "subject", "setting"), right.tolist(), strict=True)
    }
