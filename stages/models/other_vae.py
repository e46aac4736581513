"""``model.vae``: an autoencoder of its own in the place of a checkpoint's, a folder or one file. Nothing is loaded.

One file is described by the checkpoint's own config, unless a ``config.json`` lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stages.config import ConfigError
from stages.memory.refs import TensorRef
from stages.memory.tensors import read_header
from stages.models.locate import described_beside, lone_weights
from stages.models.scales import with_scales
from stages.models.single_file import VAE, converted_vae, relocate

KEY, CLASS = "model.vae", "AutoencoderKL"
# what latents of the one have to share with those of the other; the class's own defaults
_SHARED: Mapping[str, Any] = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}
_MARK = "mid.block_1.norm1.weight"  # of the original layout


def vae_config(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Of the autoencoder at ``path``, beside the config of the checkpoint's.

    Raises:
        ConfigError: its latents are others than the checkpoint's.
    """
    found = described_beside(path, CLASS) or dict(checkpoint)
    levels = (len(one.get("block_out_channels") or (64,)) for one in (found, checkpoint))
    pairs = {name: (found.get(name, usual), checkpoint.get(name, usual)) for name, usual in _SHARED.items()}
    for name, (got, expected) in {**pairs, "levels": tuple(levels)}.items():
        if got != expected:
            raise ConfigError(KEY, f"{path} with {name}={got}", f"{expected}, as the checkpoint has it")
    return found


def vae_tensors(path: Path, config: dict[str, Any]) -> dict[str, TensorRef]:
    """The tensors of the autoencoder at ``path`` under their diffusers names, located in its file."""
    file = lone_weights(path)
    refs = with_scales(read_header(file))
    refs = {name: ref for name, ref in refs.items() if name.startswith(VAE)} or refs
    if any(name.endswith(_MARK) for name in refs):
        return relocate(refs, partial(converted_vae, config=config), file)
    return refs
