"""A full-size random checkpoint of Stable Diffusion 1.5, written once (2.1 GB)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import random_checkpoint


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in float16. ``HIGHRES_FULL_SIZE=DIR`` uses one that is there, or keeps it there."""
    folder = Path(os.environ.get("HIGHRES_FULL_SIZE") or tmp_path_factory.mktemp("full-size"))
    if not (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file():  # written last but one
        random_checkpoint.main(["sd15", str(folder)])
    return folder
