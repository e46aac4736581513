"""Files of textual inversion (https://arxiv.org/abs/2208.01618): what their headers say. No torch.

A1111's (``emb_params``; of SDXL ``clip_l`` and ``clip_g``) are named by their file, diffusers' ``learned_embeds`` by
the one tensor in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from stages.memory.raw import read_described

KEY = "model.embeddings"
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_A1111 = "emb_params"


class Inversion(NamedTuple):
    """One word that was learned. ``tensors``: of each text encoder its tensor, ``widths``: numbers of a row of it."""

    path: Path
    name: str
    tensors: dict[str, str]
    widths: dict[str, int]
    rows: int

    @property
    def tokens(self) -> list[str]:
        """As tokenizers know it, a token a row; the first is its name in prompts."""
        return [self.name, *(f"{self.name}_{number}" for number in range(1, self.rows))]


def inversions(config: DictConfig) -> list[Inversion]:
    """What ``model.embeddings`` names, in order.

    Raises:
        ValueError: a file that is none.
    """
    return [read(Path(str(path))) for path in config.model.get("embeddings") or ()]


def read(path: Path) -> Inversion:
    """Of one file, from its header.

    Raises:
        ValueError: it is none.
    """
    entries, _ = read_described(path)
    if set(entries) == set(_ENCODERS):
        name, tensors = path.stem, {encoder: tensor for tensor, encoder in _ENCODERS.items()}
    elif len(entries) == 1:
        (only,) = entries
        name, tensors = path.stem if only == _A1111 else only, {"text_encoder": only}
    else:
        raise ValueError(f"it holds {', '.join(sorted(entries)[:4])}, expected {_A1111}, clip_l and clip_g, or a word")
    shapes = {encoder: entries[tensor].shape for encoder, tensor in tensors.items()}
    rows = {1 if len(shape) == 1 else shape[0] for shape in shapes.values()}
    if any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()) or len(rows) != 1:
        raise ValueError(f"got shapes {list(shapes.values())}, expected as many rows for each text encoder")
    if not name or any(character.isspace() for character in name):
        raise ValueError(f"got the name {name!r}, expected one without spaces: rename it")
    return Inversion(path, name, tensors, {encoder: shape[-1] for encoder, shape in shapes.items()}, rows.pop())
