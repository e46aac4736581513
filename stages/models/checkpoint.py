"""Checkpoints: where the weights of each component lie and which stock class they belong to. Nothing is loaded here.

A checkpoint is a diffusers folder, a repository of the hub, or a single ``.safetensors`` file in the original layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.families.facts import WITHOUT_HEAD, known_classes
from stages.memory.refs import TensorRef
from stages.memory.tensors import read_header
from stages.models.component import Component, construct, renamed, some
from stages.models.locate import CheckpointError, choose_weights, class_in_index, fetch, names_in, refuse_pickle
from stages.models.scales import with_scales
from stages.models.tokenizers import read_tokenizer
from stages.paths import is_hub_id, is_safetensors, is_weights_file, local_path

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from stages.models.single_file import SingleFile

LARGE_INTEGER = 10**20  # transformers' own: a length of this many tokens or more is none
MOST_LAYERS = 1000  # of a kind in one network
_VOCABULARY = ("vocab.json", "merges.txt")

__all__ = ["Checkpoint", "CheckpointError"]


class Checkpoint:
    """An opened checkpoint; see :meth:`open`. ``folder`` holds configs, scheduler, tokenizer."""

    def __init__(
        self,
        folder: Path,
        *,
        single: SingleFile | None = None,
        variant: str | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self._single = single
        self._variant = variant
        self._files = dict(files or {})

    @classmethod
    def open(
        cls,
        path: str,
        *,
        revision: str | None = None,
        components: Iterable[str] = ("text_encoder", "unet", "vae"),
        config: str | None = None,
        prediction_type: str | None = None,
        variant: str | None = None,
        files: Mapping[str, str] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Checkpoint:
        """Open ``path``: a diffusers folder, a hub id (of which only ``components`` are downloaded), or one file.

        ``config``: for a single file, a diffusers folder with its configs (and tokenizer), where they are not those of
        Stable Diffusion 1.5, 2.1 or SDXL; it also holds the components that the file lacks. ``files``: component ->
        the file of its weights, where they are not those of ``path``; a VAE may be a folder with its config.
        ``prediction_type``: overrides the scheduler config's (a single file does not say whether it predicts
        ``epsilon`` or ``v_prediction``). ``variant``: ``fp16``, or ``""`` for the plain files; None takes fp16 where it
        exists. ``note``: gets lines about a download.
        """
        refuse_pickle(path)
        own = {name: Path(file) for name, file in (files or {}).items() if name in components}
        found = local_path(path)
        if found is None and is_hub_id(path):
            rest = [name for name in components if name not in own]
            found = fetch(path, rest, revision=revision, variant=variant, note=note)
        if found is None:
            raise CheckpointError(
                f"model.path: got {path!r}, which does not exist; expected a diffusers folder, a hub id such as "
                "stable-diffusion-v1-5/stable-diffusion-v1-5, or a .safetensors file."
            )
        if found.is_dir():
            checkpoint = cls(found, variant=variant, files=own)
            if components and not any((found / name).is_dir() for name in components):
                raise CheckpointError(
                    f"{found}: not a diffusers folder: expected one of {', '.join(components)} in it, got "
                    f"{', '.join(sorted(p.name for p in found.iterdir())[:8]) or 'an empty folder'}."
                )
        else:
            if not is_weights_file(found):
                raise CheckpointError(f"{found}: expected a folder, a .safetensors or a .gguf file.")
            from stages.models.single_file import SingleFile

            single = SingleFile.open(found, config=config)
            checkpoint = cls(single.config_folder, single=single, variant=variant, files=own)
        checkpoint.prediction_type = prediction_type
        return checkpoint

    prediction_type: str | None = None

    @property
    def single(self) -> bool:
        """Whether it is one file, which holds no tokenizer."""
        return self._single is not None

    @property
    def revision(self) -> str | None:
        """The resolved revision of a hub repository; None for a folder or a file."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def config(self, name: str) -> dict[str, Any]:
        """The config of component ``name``, without what says how it is run."""
        found = _json(self.folder / name / "config.json")
        if name == "vae" and name in self._files:
            from stages.models.other_vae import vae_config

            found = vae_config(self._files[name], found)
        _check_layers(self.folder / name, found)
        return plain(found) if "encoder" in name else found

    def has_config(self, name: str) -> bool:
        """Whether there is a component ``name``."""
        there = (self.folder / name / "config.json").is_file()
        if self._single is None or not there or self._single.holds(name):
            return there
        return any(file.startswith(f"{name}/") and is_safetensors(file) for file in names_in(self.folder))

    def component(self, name: str) -> Component:
        """Locate component ``name`` (``unet``, ``vae``, ``text_encoder`` ...). CheckpointError if it cannot be used."""
        config = self.config(name)
        class_name = self._class(name, config)
        class_name = WITHOUT_HEAD.get(class_name, class_name)
        if "encoder" not in name:  # of diffusers, whether its config says so or not
            config = {"_class_name": class_name, **config}
        identities: tuple[str, ...] = ()
        if name == "vae" and name in self._files:
            from stages.models.other_vae import vae_tensors

            tensors = vae_tensors(self._files[name], config)
        elif name in self._files:
            from stages.models.single_file import denoiser_tensors

            tensors = denoiser_tensors(self._files[name], None, class_name, config)
        elif self._single and self._single.holds(name):
            tensors, identities = self._single.tensors(name, class_name, config), self._single.identities(name)
        else:
            tensors = self.tensors(name)
        tensors = renamed(construct(class_name, config), tensors)
        return Component(
            name=name,
            class_name=class_name,
            config=config,
            tensors={key: ref for key, ref in tensors.items() if key.rpartition(".")[0] not in identities},
            identities=identities,
        )

    def _class(self, name: str, config: dict[str, Any]) -> str:
        """The stock class of component ``name``: as ``model_index.json`` says, which stock pipelines go by, else its
        config; where neither does, the only one that is known for it beside the components that are there."""
        known, own = known_classes(name), config.get("architectures")
        said = class_in_index(self.folder, name) or config.get("_class_name")
        said = said or (own[0] if isinstance(own, list) and own else None)
        if said is None:
            here = known_classes(name, [path.name for path in self.folder.iterdir()])
            said = here[0] if len(here) == 1 else None
        if not isinstance(said, str) or said not in known:
            raise CheckpointError(
                f"{self.folder / name}: got a {said!r:.80}, expected {' or '.join(known) or 'another component'}: no "
                "other class is made here. Give a checkpoint of a family that is known here."
            )
        return said

    def tensors(self, name: str) -> dict[str, TensorRef]:
        """Where the tensors of a folder's component ``name`` lie, as its files name them."""
        try:
            weights = choose_weights(names_in(self.folder), name, self._variant)
        except CheckpointError as error:
            if self._single is None:
                raise
            raise CheckpointError(f"{self._single.path}: no {name} in it, nor in {self.folder}: {error}") from None
        if not weights.main.endswith(".json"):
            return with_scales(read_header(_there(self.folder / weights.main)))
        index = self.folder / weights.main
        placed = weight_map(index)
        refs: dict[str, TensorRef] = {}
        for shard in sorted(set(placed.values())):
            refs |= read_header(_there(self.folder / name / shard, f", but named by {weights.main}"))
        if lost := [key for key in placed if key not in refs]:
            raise CheckpointError(f"{index}: names {some(lost)}, in none of its shards. Download it again.")
        return with_scales({key: refs[key] for key in placed})

    def scheduler_config(self) -> tuple[str, dict[str, Any]]:
        """(class name, config) of the checkpoint's scheduler, with ``prediction_type`` where ``open`` was given one.

        The class is "" where neither the config nor ``model_index.json`` names one.
        """
        config = _json(self.folder / "scheduler" / "scheduler_config.json")
        if self.prediction_type:
            config["prediction_type"] = self.prediction_type
        return config.get("_class_name") or class_in_index(self.folder, "scheduler") or "", config

    def tokenizer(self, name: str = "tokenizer") -> CLIPTokenizer:
        """The CLIP tokenizer; a single file's is in ``config`` or the hub's cache.

        Raises:
            CheckpointError: it is nowhere, has no vocabulary, or makes more tokens than its text encoder takes.
        """
        folder = self.folder / name
        if not folder.is_dir():
            if self._single is not None:
                return self._single.tokenizer(name)
            raise CheckpointError(f"{self.folder}: got no {name} folder, expected one. Download the checkpoint again.")
        if not ((folder / "tokenizer.json").is_file() or all((folder / file).is_file() for file in _VOCABULARY)):
            raise CheckpointError(
                f"{folder}: no vocabulary in it (every prompt would be the same); expected {' and '.join(_VOCABULARY)} "
                f"or tokenizer.json, got {', '.join(sorted(p.name for p in folder.iterdir())) or 'an empty folder'}. "
                "Download the checkpoint again."
            )
        tokenizer = read_tokenizer("CLIPTokenizer", folder)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise CheckpointError(f"{folder}: its vocabulary is empty. Download the checkpoint again.")
        positions = self.config(name.replace("tokenizer", "text_encoder")).get("max_position_embeddings", 77)
        if tokenizer.model_max_length >= LARGE_INTEGER:  # what transformers takes where the files do not say
            tokenizer.model_max_length = positions
        if tokenizer.model_max_length > positions:
            raise CheckpointError(
                f"{folder}: got a model_max_length of {tokenizer.model_max_length} tokens, expected at most the "
                f"{positions} positions of the text encoder: set it in tokenizer_config.json."
            )
        return tokenizer


def _there(path: Path, why: str = "") -> Path:
    """``path``, if it or what it links to exists."""
    if not path.exists():
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise CheckpointError(f"{path}{link}: missing{why}. Download it again.")
    return path


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: name of its file beside ``index``} of a sharded component.

    Raises:
        CheckpointError: no such map, or a file that lies elsewhere: it would be read but not be part of the model.
    """
    found = _json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        got = "none" if found is None else f"{found!r:.60}"
        raise CheckpointError(f"{index}: expected a weight_map of tensors to files, got {got}. Download it again.")
    for shard in found.values():
        if not isinstance(shard, str) or "\\" in shard or Path(shard).name != shard or not is_safetensors(shard):
            raise CheckpointError(
                f"{index}: got the file {shard!r:.100}, expected the name of a .safetensors file in the same folder."
            )
    return found


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's config without what says how it is run: an attention by name can be code from the hub.

    Of a config of text and vision (as whole CLIP models have), the half that is about text.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) and "hidden_size" not in config else config
    return {key: value for key, value in config.items() if "_implementation" not in key and key != "auto_map"}


def _check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """A network of more layers than there are would be made for hours before its weights are seen not to fit."""
    for key, value in config.items():
        numbers = [value] if isinstance(value, int) else value if isinstance(value, list) else []
        if "layers" in key and any(isinstance(number, int) and number > MOST_LAYERS for number in numbers):
            raise CheckpointError(f"{folder}: got {key}={value!r:.60}, expected at most {MOST_LAYERS}.")


def _number(text: str) -> float:
    if text == "NaN":  # infinities stand in published configs
        raise ValueError("NaN is no number of a config")
    return float(text)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_number)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Expected a diffusers folder with it; download it again.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {found!r:.60}. Download it again.")
    return found
