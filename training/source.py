"""An endless source of rendered scenes on the device, without a loop over samples and without synchronisation."""

import math
import random
from dataclasses import dataclass

import torch

from .library import Library, detail_row, without_body
from .scenes import Spec, View, render

MAX_ZOOM = 8.0
CROP_ZOOM = 1.3  # above this a view counts as a crop
PLAIN = 0.25  # share of crops that look at what is nearly empty: sky, sea, sand, snow


@dataclass(kw_only=True)
class Batch:
    """images ``[B,3,H,W]`` in [-1,1]; ids ``[B,H,W]``; row ``[B]`` of Library.tokens; detail ``[B]`` of
    Library.details; crop ``[B]`` bool; spec: of all of them."""

    images: torch.Tensor
    ids: torch.Tensor
    row: torch.Tensor
    detail: torch.Tensor
    crop: torch.Tensor
    spec: Spec


class Source:
    """Renders group after group of a library. seed_base separates training scenes from held-out ones."""

    def __init__(self, library: Library, device: torch.device | str, seed: int, *, size: int = 256, seed_base: int = 0):
        self.library, self.device, self.size, self.seed_base = library, torch.device(device), size, seed_base
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def _uniform(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.generator, device=self.device)

    def view(self, count: int, crops: bool) -> View:
        """Whole scenes, or crops of log-uniform zoom 1..8: many where subjects stand, some of plain sky and ground.

        Without those, a model that is asked to add detail to an empty sky finds a use for it.
        """
        if not crops:
            return View.whole(count, self.device, self.size)
        zoom = torch.exp(self._uniform(count) * math.log(MAX_ZOOM))
        favour = self._uniform(count) < 0.4
        x = torch.where(favour, 0.28 + 0.44 * self._uniform(count), self._uniform(count))
        y = torch.where(favour, 0.25 + 0.40 * self._uniform(count), self._uniform(count))
        plain = self._uniform(count) < PLAIN
        zoom = torch.where(plain, zoom.clamp(min=2.5), zoom)
        margin = 0.5 / zoom
        band = self._uniform(count)  # the upper part of the sky or the foreground
        y = torch.where(plain, torch.where(self._uniform(count) < 0.6, 0.68 + 0.32 * band, 0.22 * band), y)
        x = torch.minimum(torch.maximum(x, margin), 1 - margin)
        y = torch.minimum(torch.maximum(y, margin), 1 - margin)
        return View(centre_x=x, centre_y=y, zoom=zoom, max_zoom=MAX_ZOOM, size=self.size)

    def draw(self, crops: bool | None = None) -> Batch:
        """One group of scenes. crops: None tosses a coin."""
        crops = self.rng.random() < 0.5 if crops is None else crops
        group = self.rng.randrange(len(self.library.specs))
        spec, count = self.library.specs[group], self.library.per_group
        row = torch.arange(count, device=self.device) + group * count
        seeds = torch.randint(2**38, (count,), generator=self.generator, device=self.device) + self.seed_base
        view = self.view(count, crops)
        images, ids = render(spec, seeds, self.library.colours[group * count : (group + 1) * count], view)
        detail = detail_row(ids, spec.time, self.generator)
        if spec.body != "none" and not crops:  # a crop is told of the whole scene
            row = row + without_body(ids) * len(self.library.colours)
        return Batch(images=images, ids=ids, row=row, detail=detail, crop=view.zoom > CROP_ZOOM, spec=spec)


class Ring:
    """A ring of rows on the device: the newest ``capacity`` samples, read at random."""

    def __init__(self, capacity: int, **like: torch.Tensor):
        self.capacity, self.filled, self._next = capacity, 0, 0
        self.rows = {k: torch.zeros(capacity, *v.shape[1:], dtype=v.dtype, device=v.device) for k, v in like.items()}

    def add(self, **rows: torch.Tensor) -> None:
        """Write a batch over the oldest rows."""
        count = len(next(iter(rows.values())))
        if self._next + count > self.capacity:
            self._next = 0
        for name, value in rows.items():
            self.rows[name][self._next : self._next + count] = value
        self._next += count
        self.filled = max(self.filled, self._next)

    def sample(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``count`` random rows of what is filled."""
        device = next(iter(self.rows.values())).device
        index = torch.randint(self.filled, (count,), generator=generator, device=device)
        return {name: value[index] for name, value in self.rows.items()}
