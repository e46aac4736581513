"""What a stage says of an error that ended it."""

import json
from pathlib import Path

import pytest
import torch

from stages.__main__ import said
from stages.config import ConfigError
from stages.events import from_line


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


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        call()
    return caught.value


def test_what_the_program_says_itself_needs_no_traceback(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = raised(lambda: from_line("[1]"))
    assert said(own, run_dir) == (str(own), True)
    library = raised(lambda: json.loads("{"))
    assert said(library, run_dir) == (f"JSONDecodeError: {library}", False)
    monkeypatch.setenv("HIGHRES_TRACEBACK", "1")
    assert not said(own, run_dir)[1] and not said(ConfigError("seed", -1, "0 or more"), run_dir)[1]


FULL = {
    "a file": OSError(28, "No space left on device", "/x/canvas.safetensors"),
    "a quota": OSError(122, "Disk quota exceeded", "/x/canvas.safetensors"),
    "a library's own": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("how", FULL)
def test_a_full_disk_is_said_as_such_and_names_the_folder(run_dir: Path, how: str) -> None:
    text, expected = said(FULL[how], run_dir)
    assert expected and text.startswith("the disk is full (") and "free some space" in text
    assert ("/x/canvas.safetensors" if how != "a library's own" else str(run_dir.parent)) in text
    wrapped = ValueError("could not write")
    wrapped.__cause__ = FULL[how]
    assert said(wrapped, run_dir)[0].startswith("the disk is full (")
