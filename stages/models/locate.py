"""Which files hold a component of a checkpoint: in a folder or in a repository of the Hugging Face hub. No torch."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from stages.files import read_json
from stages.paths import PICKLES

CONVERT = (
    'python -c "from diffusers import StableDiffusionPipeline as P; '
    "P.from_{source}({path!r}).save_pretrained('converted')\"  and then model.path=converted"
)
_BASES = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call a component's weights
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor")
_VARIANTS = ("fp16", "bf16", "")  # half the bytes to read first


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says what was found, what was expected and what helps."""


class Weights(NamedTuple):
    """The files of one component, relative to the checkpoint: one file, or the index of a sharded one."""

    main: str
    shards: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return (self.main, *self.shards)


def refuse_pickle(path: str) -> None:
    """CheckpointError for pickle files: loading one can run any code that its author put there."""
    if path.lower().endswith(PICKLES):
        raise CheckpointError(
            f"{path}: got a pickle file ({Path(path).suffix}), expected .safetensors; a pickle can run code when "
            "it is opened, so it is not read here. If you trust its author: "
            + CONVERT.format(source="single_file", path=path)
        )


def choose_weights(names: Collection[str], component: str, variant: str | None = None) -> Weights:
    """Of a checkpoint's file ``names``, those of ``component``. ``variant``: ``fp16``, ``""`` ...; None: fp16 first.

    One file goes before a sharded one. CheckpointError when there is none, or only pickles.
    """
    own = {name for name in names if name.startswith(f"{component}/")}
    for base in (f"{component}/{base}" for base in _BASES):
        for kind in _VARIANTS if variant is None else (variant,):
            mark = f".{kind}" if kind else ""
            if f"{base}{mark}.safetensors" in own:
                return Weights(f"{base}{mark}.safetensors")
            for index in (f"{base}.safetensors.index{mark}.json", f"{base}{mark}.safetensors.index.json"):
                if index in own:  # shards carry the variant before or after their number
                    shard = re.compile(rf"{re.escape(base)}({mark})?-\d+-of-\d+({mark})?\.safetensors")
                    found = [name for name in own if (m := shard.fullmatch(name)) and bool(m[1] or m[2]) == bool(kind)]
                    return Weights(index, tuple(sorted(found)))
    pickles = sorted(name for name in own if name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(
            f"{component}: got only pickle files ({', '.join(pickles)}), expected .safetensors; a pickle can run code "
            f"when it is opened. If you trust its author: {CONVERT.format(source='pretrained', path='FOLDER')}"
        )
    wanted = f"{component}/{_BASES[0] if 'encoder' not in component else _BASES[1]}[.fp16].safetensors"
    raise CheckpointError(f"{component}: no weights; expected {wanted}, got {sorted(own) or 'no such folder'}.")


def lone_weights(path: Path) -> Path:
    """The file of a model that is no part of a checkpoint: ``path``, or the one in a folder that is a component alone.

    Raises:
        CheckpointError: there is none, only pickles, or several that belong together.
    """
    if path.is_file():
        return path
    try:
        main = choose_weights({f"model/{file.name}" for file in path.iterdir()}, "model").main
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if main.endswith(".json"):
        raise CheckpointError(f"{path}: its weights lie in several files, expected one .safetensors file.")
    return path / main.partition("/")[2]


def described_beside(path: Path, class_name: str) -> dict[str, Any] | None:
    """The ``config.json`` of a folder, or beside a file, if it is of a ``class_name``."""
    found = read_json((path if path.is_dir() else path.parent) / "config.json")
    return found if isinstance(found, dict) and found.get("_class_name") == class_name else None


def fetch(
    repo_id: str,
    components: Iterable[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The snapshot folder of a hub repository with the files of ``components``, downloaded where they are missing.

    A snapshot in the cache that has them all is taken as it is, without asking the hub: runs stay repeatable and work
    offline (give ``revision`` for another one). ``note`` gets a line when a download starts and as it goes on. Configs,
    the scheduler and the tokenizer are always included.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    components = tuple(name for name in components if not name.startswith(_WITHOUT_WEIGHTS))
    small = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=small))
        for component in components:
            choose_weights(names_in(folder), component, variant)
        return folder
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # not in the cache, or not all of it: ask the hub
    try:
        listed = snapshot_download(repo_id, revision=revision, dry_run=True)
        names = {entry.filename: entry for entry in listed}  # type: ignore[union-attr]
        chosen = [file for c in components for file in choose_weights(names, c, variant).files]
        missing = [names[file].file_size or 0 for file in chosen if names[file].will_download]
        if note and missing:
            note(f"downloading {repo_id}: {len(missing)} files, {sum(missing) / 1e9:.2f} GB")
        bar = _bar(repo_id, note) if note else None
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=small + chosen, tqdm_class=bar))
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"model.path={repo_id}: not in the local cache and the hub did not give it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]} Check the name and the network, or give a folder or a .safetensors "
            "file as model.path. (Gated models need `hf auth login`.)"
        ) from error


def class_in_index(folder: Path, component: str) -> str | None:
    """The class that a folder's ``model_index.json`` names for ``component``: what stock pipelines go by."""
    index = read_json(folder / "model_index.json")
    entry = index.get(component) if isinstance(index, dict) else None
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def names_in(folder: Path) -> set[str]:
    """File names of a checkpoint folder, relative to it, one level deep."""
    return {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}


def _bar(repo_id: str, note: Callable[[str], None], seconds: float = 5.0) -> type:
    from tqdm.std import tqdm

    class Bar(tqdm):
        """The hub's byte counters, told as one line every few seconds instead of drawn."""

        told = time.monotonic()

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n or 0)
            if self.unit == "B" and self.total and time.monotonic() - Bar.told > seconds:
                Bar.told = time.monotonic()
                note(f"downloading {repo_id}: {self.n / 1e9:.2f} of {self.total / 1e9:.2f} GB")
            return shown

    return Bar
