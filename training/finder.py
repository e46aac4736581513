"""Where subjects stand: a small per-pixel classifier of rendered scenes, to count what a picture shows.

``count(image, "lighthouse")`` is the public face: tests ask a canvas of many tiles for one subject, and count.

    python -m training.finder --seconds 240 --fresh    # trains it anew and writes finder.safetensors
    python -m training.finder --seconds 400            # goes on from there

The weights that ship are the mean of two such trainings, of which the second went on from the first and saw half of its
scenes as the autoencoder returns them: one alone was unsure of generated pictures, the other of windmills.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .scenes import MATERIALS, View, render
from .specs import Spec, sample_spec

WEIGHTS = Path(__file__).parent / "finder.safetensors"
CLASSES = ("none", "lighthouse", "house", "castle", "windmill", "tree")  # what stands on land and can be doubled
SIDE = 320  # pixels of the longer side that pictures are looked at with
CELL = 4  # pixels of that to one of the map
PEAK_LR = 3e-3
FAINT, LEAST = 0.15, 3  # probability that still joins parts; sure cells of a subject: less is a speck


class Finder(nn.Module):
    """Three strided convolutions, a dilated trunk, one skip; 0.1 M parameters."""

    def __init__(self, width: int = 40, classes: int = len(CLASSES)):
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.GroupNorm(4, 24)
        )
        self.down = nn.Conv2d(24, width, 3, 2, 1)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=d, dilation=d))
            for d in (1, 2, 4, 8, 2, 1)
        )
        self.out = nn.Sequential(
            nn.Conv2d(width + 24, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, classes, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images ``[B,3,H,W]`` in [-1,1], sides multiples of 8. Returns logits ``[B,classes,H/4,W/4]``."""
        fine = self.fine(images)
        deep = self.down(F.silu(fine))
        for layer in self.trunk:
            deep = deep + layer(deep)
        wide = F.interpolate(deep, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([wide, F.silu(fine)], 1))


@lru_cache(maxsize=2)
def load_finder(path: Path = WEIGHTS) -> Finder:
    """The trained finder, as wide and of as many classes as the file has. FileNotFoundError where it is missing."""
    from safetensors.torch import load_file

    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    model = Finder(len(weights["down.bias"]), len(weights["out.3.bias"]))
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def class_maps(image: torch.Tensor, model: Finder, side: int = SIDE) -> torch.Tensor:
    """Probabilities ``[classes, h, w]`` of a picture ``[1,3,H,W]`` in [-1,1] looked at with ``side`` pixels."""
    scale = side / max(image.shape[-2:])
    size = [max(8, round(length * scale / 8) * 8) for length in image.shape[-2:]]
    small = F.interpolate(image.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return model(small).softmax(1)[0]


def subject_map(image: torch.Tensor, subject: str, side: int = SIDE, model: Finder | None = None) -> torch.Tensor:
    """Probability of ``subject``, ``[h, w]``, of a picture ``[1,3,H,W]`` in [-1,1] looked at with ``side`` pixels."""
    return class_maps(image, model or load_finder(), side)[CLASSES.index(subject)]


def count(image: torch.Tensor, subject: str, side: int = SIDE, model: Finder | None = None) -> int:
    """How many ``subject`` a picture ``[1,3,H,W]`` in [-1,1] shows: connected parts of its map."""
    return count_parts(subject_map(image, subject, side, model))


def count_parts(probability: torch.Tensor, share: float = 0.0) -> int:
    """Connected parts of a map ``[h, w]``.

    A part reaches as far as ``FAINT`` (a lamp and its tower are one), and counts if it is sure somewhere, in ``share``
    as many cells as the largest.
    """
    from scipy import ndimage

    found = probability.cpu().numpy()
    reached = ndimage.binary_dilation(found > FAINT)
    labelled: Any = ndimage.label(reached, structure=np.ones((3, 3)))
    parts, number = labelled
    sizes = np.asarray(ndimage.sum_labels(found > 0.5, parts, range(1, number + 1)))
    return int((sizes >= max(LEAST, share * sizes.max(initial=0))).sum())


def _specs(rng: random.Random) -> Spec:
    """Lighthouses, and at the same places what has to be told from one: nothing, and every other tall thing."""
    spec = sample_spec(rng)
    if rng.random() < 0.2:
        return spec
    subject = rng.choice(("lighthouse", "lighthouse", "none", "house", "castle", "castle", "tree", "windmill"))
    alone = subject in ("lighthouse", "none")  # nothing else stands in the sea
    setting = rng.choice(("cliff", "cliff", "beach", "sea" if alone else "meadow", spec.setting))
    setting = "meadow" if setting in ("sea", "lake") and not alone else setting
    return Spec(spec.time, spec.weather, setting, subject, spec.body, spec.backdrop)


class Task(NamedTuple):
    """What is learned: the classes ``names``, of scenes whose specs ``draw`` gives, ``size`` pixels a side.

    Classes that are not ``common`` weigh four times as much. ``mosaics``: share of batches of four scenes a picture.
    ``each``: scenes of a spec, ``pictures``: of a batch, more of both for a GPU.
    """

    draw: Callable[[random.Random], Spec] = _specs
    names: Sequence[str] = CLASSES
    common: Sequence[str] = CLASSES[:1]
    mosaics: float = 0.6
    size: int = 192
    renew: int = 5  # steps after which the scenes of a spec are replaced; 0: never
    width: int = 40
    each: int = 4
    pictures: int = 2
    device: str = "cpu"


def scenes(rng: random.Random, count: int, size: int = 192, task: Task = Task()) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: B008 - frozen
    """``count`` times ``task.each`` scenes: pictures ``[N,3,s,s]`` uint8, classes of their pixels ``[N,s,s]`` uint8."""
    names, each, device = task.names, task.each, task.device
    table = torch.tensor([names.index(name) if name in names else 0 for name in MATERIALS], dtype=torch.uint8)
    images, classes = [], []
    for _ in range(count):
        seeds = torch.tensor([rng.randrange(1, 2**31) for _ in range(each)], device=device)
        colours = torch.tensor([rng.randrange(8) for _ in range(each)], device=device)
        pixels, ids = render(task.draw(rng), seeds, colours, View.whole(each, device, size=size))
        images.append(((pixels + 1) * 127.5).round().clamp(0, 255).byte())
        classes.append(table.to(device)[ids.long()])
    order = torch.randperm(each * count, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(device)
    return torch.cat(images)[order], torch.cat(classes)[order]


@lru_cache(maxsize=1)
def _autoencoder(device: str) -> Any:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(Path(__file__).parent.parent / "models" / "embedded" / "vae")
    return vae.eval().to(device)


@torch.no_grad()
def through_autoencoder(images: torch.Tensor) -> torch.Tensor:
    """``[N,3,s,s]`` uint8 as the embedded model's autoencoder returns them: what is generated looks like that."""
    vae = _autoencoder(str(images.device))
    back = vae.decode(vae.encode(images.float() / 127.5 - 1).latent_dist.mode()).sample
    return ((back + 1) * 127.5).round().clamp(0, 255).byte()


def _batch(
    images: torch.Tensor, classes: torch.Tensor, rng: random.Random, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, or mosaics of two by two, at a random size: subjects from a twentieth to half of what is seen."""
    columns, device = 2 if rng.random() < task.mosaics else 1, images.device
    picks = torch.tensor([rng.randrange(len(images)) for _ in range(task.pictures * columns**2)], device=device)
    big = images[picks].float() / 127.5 - 1
    ids = classes[picks].float()[:, None]
    side = rng.choice((192, 240, 288) if columns == 2 else (128, 192, 288))
    each = side // columns
    big = F.interpolate(big, (each, each), mode="bilinear", antialias=True, align_corners=False)
    ids = F.interpolate(ids, (each, each), mode="nearest-exact")

    def mosaic(parts: torch.Tensor) -> torch.Tensor:
        n = len(parts) // columns**2
        grid = parts.view(n, columns, columns, *parts.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(n, parts.shape[1], side, side)

    big, ids = mosaic(big), mosaic(ids)
    if rng.random() < 0.5:
        big, ids = big.flip(-1), ids.flip(-1)
    gain = 1 + 0.2 * (torch.rand((len(big), 3, 1, 1), device=device) - 0.5)
    shift = 0.1 * (torch.rand((len(big), 1, 1, 1), device=device) - 0.5)
    big = (big * gain + shift + torch.randn_like(big) * rng.uniform(0, 0.06)).clamp(-1, 1)
    if (soft := rng.choice((1, 1, 3, 5))) > 1:
        big = F.avg_pool2d(big, soft, 1, soft // 2, count_include_pad=False)
    flat = F.one_hot(ids[:, 0].long(), len(task.names)).permute(0, 3, 1, 2).float()
    return big, F.avg_pool2d(flat, CELL)


Pool = tuple[torch.Tensor, torch.Tensor]  # pictures and classes, as ``scenes`` gives them


def gather(rng: random.Random, groups: int, task: Task) -> Pool:
    """``groups`` times ``task.each`` scenes, half of them through the autoencoder."""
    images, classes = scenes(rng, groups, task.size, task)
    for part in images[: len(images) // 2].split(8):
        part.copy_(through_autoencoder(part))
    return images, classes


def train(
    seconds: float,
    start: Finder | None = None,
    *,
    seed: int = 0,
    groups: int = 100,
    task: Task = Task(),  # noqa: B008 - frozen
    pool: Pool | None = None,
) -> Finder:
    """A finder trained for ``seconds``, from ``start`` on, on rendered scenes: those of ``pool`` or new ones."""
    rng, begin = random.Random(seed), time.monotonic()
    torch.manual_seed(seed)
    images, classes = pool or gather(rng, groups, task)
    print(f"{len(images)} scenes in {time.monotonic() - begin:.0f} s", flush=True)
    model = (start or Finder(task.width, len(task.names))).to(task.device).train()
    begin, step = time.monotonic(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    mean: Any = 0.0
    weights = [1.0 if name in task.common else 4.0 for name in task.names]
    weight = torch.tensor(weights, device=task.device).view(1, -1, 1, 1)
    while (spent := (time.monotonic() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent))
        pixels, target = _batch(images, classes, rng, task)
        loss = -(model(pixels).log_softmax(1) * target * weight).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean = 0.98 * mean + 0.02 * loss.detach() if step > 1 else loss.detach()
        if step % 200 == 0:
            print(f"step {step}, {spent:.0%}: loss {float(mean):.4f}", flush=True)
        if task.renew and step % task.renew == 0:
            new, ids = scenes(rng, 1, task.size, task)
            at = torch.tensor([rng.randrange(len(images)) for _ in range(task.each)], device=task.device)
            images[at], classes[at] = through_autoencoder(new) if rng.random() < 0.5 else new, ids
    return model.eval()


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--seconds", type=float, default=240)
    options.add_argument("--seed", type=int, default=0, help="of the scenes")
    options.add_argument("--fresh", action="store_true", help="from nothing, not from the weights there are")
    options.add_argument("--out", type=Path, default=WEIGHTS)
    given = options.parse_args()
    torch.set_num_threads(1)  # pictures are small: threads would wait for one another more than they work
    from .models import halves, save_halves

    model = train(given.seconds, None if given.fresh else load_finder(), seed=given.seed)
    save_halves(halves(model), given.out)


if __name__ == "__main__":
    main()
