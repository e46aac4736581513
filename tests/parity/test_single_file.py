"""Every weight read through a checkpoint's references equals what stock diffusers loads from the same files."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from benchmarks import random_checkpoint
from stages.memory.tensors import read_tensor
from stages.models.checkpoint import Checkpoint

COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint: a diffusers folder, and the same weights as one file in the original layout."""
    path = tmp_path_factory.mktemp(kind)
    random_checkpoint.main([kind, str(path), "--layout", "both", "--small", "--dtype", "fp32"])
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


def assert_same(checkpoint: Checkpoint, pipeline: StableDiffusionPipeline, dtype: torch.dtype = torch.float32) -> None:
    for name in COMPONENTS:
        component = checkpoint.component(name)
        expected = getattr(pipeline, name)
        model = component.build()
        assert type(model) is type(expected)
        assert component.tensors.keys() == expected.state_dict().keys() == model.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            read = read_tensor(component.tensors[key])
            assert read.dtype == dtype
            assert torch.equal(read, tensor), f"{name}: {key}"
    assert checkpoint.scheduler_config()[0] == type(pipeline.scheduler).__name__


def test_folder(folder: Path, stock: StableDiffusionPipeline) -> None:
    assert_same(Checkpoint.open(str(folder)), stock)


def test_single_file(kind: str, folder: Path) -> None:
    file = folder / f"{kind}.safetensors"
    stock = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert_same(Checkpoint.open(str(file), config=str(folder)), stock)


def test_single_file_holds_the_folders_weights(kind: str, folder: Path, stock: StableDiffusionPipeline) -> None:
    assert_same(Checkpoint.open(str(folder / f"{kind}.safetensors"), config=str(folder)), stock)


def test_fp16_variant_goes_first(folder: Path, stock: StableDiffusionPipeline, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    random = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    random.save_pretrained(tmp_path, variant="fp16")
    half = StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert_same(Checkpoint.open(str(tmp_path)), half, torch.float16)
    assert_same(Checkpoint.open(str(tmp_path), variant=""), stock)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(stock: StableDiffusionPipeline, tmp_path: Path, variant: str | None) -> None:
    stock.save_pretrained(tmp_path, max_shard_size="300KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert_same(Checkpoint.open(str(tmp_path)), StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant))


def test_older_names(folder: Path, tmp_path: Path) -> None:
    """VAE attention as diffusers once named it, and the position ids that transformers once saved."""
    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for new, name in old.items():
        weights = {k.replace(new, name) if "attentions" in k else k: v for k, v in weights.items()}
    assert any("proj_attn" in key for key in weights)
    save_file(weights, path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    assert_same(Checkpoint.open(str(tmp_path)), StableDiffusionPipeline.from_pretrained(tmp_path))


def test_same_text_embeddings(folder: Path, stock: StableDiffusionPipeline) -> None:
    """The built text encoder computes as the stock one does: its buffers are real, its config is whole."""
    checkpoint = Checkpoint.open(str(folder))
    component = checkpoint.component("text_encoder")
    model = component.build()
    model.load_state_dict({k: read_tensor(ref) for k, ref in component.tensors.items()}, assign=True)
    ids = [checkpoint.tokenizer()("a cat, 猫", padding="max_length").input_ids]
    assert ids == [stock.tokenizer("a cat, 猫", padding="max_length").input_ids]
    with torch.no_grad():
        got, expected = (encoder(torch.tensor(ids)).last_hidden_state for encoder in (model, stock.text_encoder))
    assert torch.equal(got, expected)
