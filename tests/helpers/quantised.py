"""GGUF files of blocks that are drawn, not computed: the ``gguf`` package has no quantisers of the K types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

# where the float16 scales of a block lie, in bytes, and what they are to be for numbers of about 1
_SCALES = {
    "Q2_K": {80: 1 / 16, 82: 1 / 10},
    "Q3_K": {108: 1 / 40},
    "Q4_0": {0: 1 / 5},
    "Q4_1": {0: 1 / 5, 2: -1.5},
    "Q4_K": {0: 1 / 128, 2: 1 / 20},
    "Q5_0": {0: 1 / 10},
    "Q5_1": {0: 1 / 10, 2: -1.5},
    "Q5_K": {0: 1 / 256, 2: 1 / 20},
    "Q6_K": {208: 1 / 1000},
    "Q8_0": {0: 1 / 80},
    "IQ4_NL": {0: 1 / 60},
    "IQ4_XS": {0: 1 / 1000},
}
KINDS = tuple(_SCALES)


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """Bytes of numbers of ``shape``, whose rows are whole blocks; they are of about ``scale``."""
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    count = math.prod(shape) // numbers
    raw = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for at, usual in _SCALES[kind].items():
        drawn = (usual * scale * generator.uniform(0.9, 1.1, count)).astype(np.float16)
        raw[:, at : at + 2] = drawn.view(np.uint8).reshape(count, 2)
    return raw.reshape(*shape[:-1], shape[-1] // numbers * size)


def write_gguf(
    path: Path, tensors: Mapping[str, tuple[np.ndarray[Any, Any], str]], architecture: str = "flux", **lists: Any
) -> None:
    """``tensors``: name -> (array, GGML's name of the type; quantised ones as bytes). ``lists``: of the metadata."""
    writer = GGUFWriter(path, architecture)
    for key, value in lists.items():
        writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        plain = kind in ("F32", "F16")
        writer.add_tensor(name, array, raw_dtype=None if plain else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
