"""Tokenizers of a checkpoint as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.memory.imports import light_imports
from stages.models.locate import CheckpointError


def read_tokenizer(kind: str, folder: Path) -> Any:
    """The one in ``folder``, of transformers' class ``kind``.

    Raises:
        CheckpointError: its files cannot be read.
    """
    with light_imports("transformers"):
        import transformers

        made: Any = getattr(transformers, kind)
    try:
        return made.from_pretrained(folder)
    except Exception as error:  # the library reads files of any shape in its own way
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
        raise CheckpointError(f"{folder}: cannot be read ({said}). Download the checkpoint again.") from error
