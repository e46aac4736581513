"""What a stage says of an error that ended it."""

from pathlib import Path

import pytest
import torch

from stages.__main__ import said
from stages.config import ConfigError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("memory:\n  device_budget: 500MB\n", encoding="utf-8")
    return tmp_path


def test_a_gpu_out_of_memory_names_the_key_what_was_got_and_what_helps(run_dir: Path) -> None:
    text, expected = said(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 250.00 MiB. GPU 0 has"), run_dir
    )
    assert expected and text.startswith("memory.device_budget: got 500MB, which was not enough (CUDA out of memory)")
    assert "denoise.tile_size" in text


def test_other_errors_keep_their_kind(run_dir: Path) -> None:
    assert said(KeyError("latents"), run_dir) == ("KeyError: 'latents'", False)
    assert said(ConfigError("seed", -1, "0 or more"), run_dir) == ("seed: got -1, expected 0 or more.", True)
