"""What comes out, before it has: the latents of a step as colours, small, for the report. No result hangs on it.

The colours are a linear map of the latents, fitted once to what the VAE makes of them (``guide`` and ``decode`` have
both) and kept beside the results. Or a tiny VAE of the same latents decodes them (``model.preview_vae=FOLDER``: TAESD).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.context import StageContext
from stages.files import atomic_path, read_object, write_json
from stages.hashes import fingerprint
from stages.models.tiny_vae import open_tiny
from stages.picture.png import PngWriter
from stages.tiles import Size
from stages.workflow.identity import model_identity

SIDE = 256  # latents of a preview, at most: every n-th of a larger canvas
TINY_SIDE = 64  # of one that the tiny VAE decodes
_TILE, _HALO = 24, 4  # latents that it decodes at a time, and around them
_ROWS = 64  # of latents that a map is fitted to


class Preview:
    """Writes ``report/preview_STAGE.png`` of the run, from the bands of a canvas of ``size`` latents."""

    def __init__(self, context: StageContext, size: Size) -> None:
        self._path = context.run_dir / "report" / f"preview_{context.name}.png"
        self._colours, self._vae = read_object(_fitted(context)).get("map"), None
        if context.config.preview.vae:
            self._vae = open_tiny(Path(context.config.preview.vae))
        self._every = max(1, -(-max(size) // (TINY_SIDE if self._vae is not None else SIDE)))
        self._kept: list[Tensor] = []

    def add(self, top: int, rows: Tensor) -> None:
        """The next band, ``[1, C, h, W]`` float32."""
        self._kept.append(rows[0, :, -top % self._every :: self._every, :: self._every].clone())

    def write(self) -> None:
        """Of the bands that were added since the last one."""
        latents, self._kept = torch.cat(self._kept, dim=1), []
        pixels = coloured(latents, self._colours) if self._vae is None else decoded(self._vae, latents)
        with (
            atomic_path(self._path, sync=False) as temporary,
            open(temporary, "wb") as file,
            PngWriter(file, pixels.shape[1], pixels.shape[0], threads=1) as png,
        ):
            png.write(pixels)


def learn(context: StageContext, latents: Tensor, pixels: Tensor) -> None:
    """Fit the map to what the VAE made of a few latents, unless it is known.

    Args:
        latents: ``[C, h, w]`` float32.
        pixels: ``[3, f h, f w]`` uint8.
    """
    path = _fitted(context)
    if path.is_file():
        return
    every, f = max(1, latents.shape[1] // _ROWS), pixels.shape[1] // latents.shape[1]
    seen = pixels.unflatten(1, (-1, f))[:, ::every].unflatten(3, (-1, f)).float().mean(dim=(2, 4)) / 255
    given = latents[:, ::every]
    known = torch.cat([given, torch.ones_like(given[:1])]).flatten(1).double()
    # a little ridge: a picture of one colour has no directions
    square = known @ known.T + 1e-3 * known.shape[1] * torch.eye(len(known), dtype=torch.float64)
    write_json(path, {"map": torch.linalg.solve(square, known @ seen.flatten(1).double().T).tolist()})


def _fitted(context: StageContext) -> Path:
    """Where the map of this VAE's latents is."""
    root = Path(context.config.output_dir) / ".store"
    return root / ".previews" / f"{fingerprint(model_identity(context.config, ('vae',), root / '.identity'))}.json"


def coloured(latents: Tensor, colours: Any) -> np.ndarray:
    """``[h, w, 3]`` uint8 of ``latents [C, h, w]``. Without a map for so many channels their three strongest
    directions are red, green and blue: shapes are right, colours are not."""
    flat = latents.flatten(1).double()
    if isinstance(colours, list) and len(colours) == len(flat) + 1:
        weights = torch.tensor(colours, dtype=torch.float64)
        mixed = weights[:-1].T @ flat + weights[-1][:, None]
    else:
        centred = flat - flat.mean(dim=1, keepdim=True)
        strongest = torch.linalg.eigh(centred @ centred.T)[1][:, -3:].T @ centred
        mixed = 0.5 + 0.2 * strongest / strongest.std(dim=1, keepdim=True, correction=0).clamp_min(1e-6)
    pixels = (mixed.reshape(-1, *latents.shape[1:]).permute(1, 2, 0) * 255).round().clamp(0, 255)
    return np.ascontiguousarray(pixels.nan_to_num().to(torch.uint8).expand(-1, -1, 3).numpy())


@torch.inference_mode()
def decoded(vae: Any, latents: Tensor) -> np.ndarray:
    """``[f h, f w, 3]`` uint8 of ``latents [C, h, w]``, tile by tile."""
    _, height, width = latents.shape
    rows = []
    for top in range(0, height, _TILE):
        row = []
        for left in range(0, width, _TILE):
            above, before = min(top, _HALO), min(left, _HALO)
            box = latents[None, :, top - above : top + _TILE + _HALO, left - before : left + _TILE + _HALO]
            pixels = vae.decode(box.contiguous(), return_dict=False)[0][0]
            f = pixels.shape[1] // box.shape[2]
            row.append(pixels[:, above * f :, before * f :][:, : _TILE * f, : _TILE * f])
        rows.append(torch.cat(row, dim=2))
    whole = torch.cat(rows, dim=1)
    return np.ascontiguousarray(((whole.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
