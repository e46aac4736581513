"""``model.vae``: another autoencoder in the place of the checkpoint's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Work
from safetensors.torch import save_file
from torch import Tensor

from stages.config import ConfigError
from stages.families.facts import FACTS
from stages.families.opening import open_checkpoint
from stages.memory.tensors import read_tensor, read_tensors

FIRST = "first_stage_model."


@pytest.fixture
def other(work: Work, tmp_path: Path) -> Path:
    """A folder with an autoencoder of the same shapes."""
    shutil.copytree(work.checkpoint / "vae", tmp_path / "other")
    file = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in read_tensors(file).items()}, file)
    return tmp_path / "other"


def weights(work: Work, path: Path) -> dict[str, Tensor]:
    config = work.config({"model.vae": str(path)})
    component = open_checkpoint(config, ("vae",), lambda _: None).component("vae")
    component.build()
    return {name: read_tensor(ref) for name, ref in component.tensors.items()}


def test_a_folder_and_a_file_in_any_layout(work: Work, other: Path) -> None:
    file = other / "diffusion_pytorch_model.safetensors"
    expected = read_tensors(file)
    for path in (other, file):
        found = weights(work, path)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    found, own = weights(work, work.checkpoint / "sd15.safetensors"), weights(work, work.checkpoint / "vae")
    assert all(torch.equal(found[name].flatten(), own[name].flatten()) for name in own), "of a whole checkpoint"
    whole = read_tensors(work.checkpoint / "sd15.safetensors")
    bare = {name.removeprefix(FIRST): one for name, one in whole.items() if name.startswith(FIRST)}
    save_file({name: one.clone() for name, one in bare.items()}, other / "bare.safetensors")
    found = weights(work, other / "bare.safetensors")
    assert all(torch.equal(found[name].flatten(), own[name].flatten()) for name in own)


def test_it_decides_the_guide_and_the_pixels(work: Work, other: Path) -> None:
    def prints(**values: Any) -> dict[str, str]:
        return {name: one.fingerprint for name, one in work.states(work.config(values)).items()}

    plain, found = prints(), prints(**{"model.vae": str(other)})
    assert [name for name in plain if plain[name] != found[name]] == ["guide", "denoise", "decode", "stitch"]
    values = {"guide.mode": "none", "denoise.num_inference_steps": 1}
    first = work.run(values, until="decode")["decode"]
    second = work.run({**values, "model.vae": str(other)}, until="decode")["decode"]
    tile = "tiles/r00_c00.safetensors"
    assert not torch.equal(*(read_tensors(one / tile)["pixels"] for one in (first, second)))


@pytest.mark.parametrize(
    ("key", "value"), [("latent_channels", 16), ("scaling_factor", 0.13025), ("shift_factor", 0.1)]
)
def test_latents_of_another_kind_are_refused(work: Work, other: Path, key: str, value: float) -> None:
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConfigError, match=rf"model\.vae: got .*{key}={value}', expected"):
        open_checkpoint(work.config({"model.vae": str(other)}), FACTS["sd"].opened, lambda _: None)


def test_what_is_no_autoencoder_is_refused(work: Work, tmp_path: Path, other: Path) -> None:
    from stages.workflow.model import check_path

    (other / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    for path, said in (
        (other, "with a AutoencoderTiny"),
        (tmp_path, "without config.json"),
        (Path("a.ckpt"), "Unpickling"),
        (Path("stabilityai/sd-vae-ft-mse"), "hf download stabilityai/sd-vae-ft-mse"),
    ):
        with pytest.raises(ConfigError, match=rf"model\.vae: got .*{said}"):
            check_path(work.config({"model.vae": str(path)}))
    with pytest.raises(ConfigError, match=r"model\.vae: got .*AutoencoderKLFlux2 of its own"):
        work.config({"model.vae": "x", "model.family": "flux2_klein"})
