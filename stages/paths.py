"""What a path on the command line means: a local file or folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from stages.config import ROOT

PICKLES = (".ckpt", ".pt", ".pth", ".bin")  # endings: opening one can run any code that its author put there
SAFETENSORS = (".safetensors", ".sft")
GGUF = ".gguf"
_FILES = (*SAFETENSORS, GGUF, ".json", *PICKLES)  # endings that no repository's name has
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Whether ``path`` reads as ``org/name``, not as a file's name, and nothing of that name lies on disk."""
    return bool(_HUB_ID.fullmatch(path)) and not path.lower().endswith(_FILES) and local_path(path) is None


def is_safetensors(name: str) -> bool:
    """Whether ``name`` ends as safetensors files do."""
    return name.lower().endswith(SAFETENSORS)


def is_weights_file(path: Path) -> bool:
    """Whether a file may be a single checkpoint by its name; the hub's cache links to files without an ending."""
    return path.is_file() and (path.name.lower().endswith((*SAFETENSORS, GGUF)) or not path.suffix)


def local_path(path: str) -> Path | None:
    """The file or folder that ``path`` names, from the current folder or the project's; None if there is none."""
    expanded = Path(path).expanduser()
    return next((p.resolve() for p in (expanded, ROOT / expanded) if p.exists()), None)


def anchored(path: str, near: bool = False) -> Path:
    """Absolute: as given, else (with ``near``) under the current folder if it is there, else under the project."""
    expanded = Path(path).expanduser()
    return expanded.absolute() if near and expanded.exists() else ROOT / expanded


def files_of(path: Path) -> list[Path]:
    """The files of a model that is no part of a checkpoint: its config, if there is one, and its weights; of a folder
    all that may be."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    weights = sorted(one for one in path.iterdir() if is_safetensors(one.name)) if path.is_dir() else [path]
    return [config, *weights] if config.is_file() else weights
