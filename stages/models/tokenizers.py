"""Tokenizers of a checkpoint as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from stages.memory.imports import light_imports
from stages.models.locate import CheckpointError

LEFT = 9_000_000  # bytes that stay when an open tokenizer was given up and its memory returned
# bytes that one takes, and takes while it is opened, for a byte of its file (python -m benchmarks vocabularies)
_FAST, _WORDS, _UNIGRAM = (9, 15), (9, 10), (28, 31)


class Room(NamedTuple):
    """Bytes of a tokenizer: while it is open, while it is being opened, when it has been given up."""

    held: int
    opening: int
    left: int


def room(folder: Path, unigram: bool = False) -> Room:
    """Of the one in ``folder``; ``unigram``: T5's kind, else byte pairs."""
    whole = folder / "tokenizer.json"
    files = [whole] if whole.is_file() else [folder / "vocab.json", folder / "merges.txt"]
    size = sum(file.stat().st_size for file in files if file.is_file())
    held, opening = _UNIGRAM if unigram else _FAST if whole.is_file() else _WORDS
    return Room(held * size, opening * size, min(LEFT, held * size))


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
