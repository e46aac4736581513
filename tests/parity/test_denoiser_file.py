"""A quantised FLUX.1 in the files that people have, against the stock pipeline with the same numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_flux
import torch
from diffusers import FluxPipeline
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from in_process import Work, look
from omegaconf import DictConfig
from quantised import blocks, write_gguf
from safetensors.torch import load_file, save_file
from small_flux import ONE_TILE, originally
from torch import Tensor

from benchmarks.original_layout import vae_name
from stages import PIPELINE
from stages.config import ConfigError
from stages.families.flux import FAMILY
from stages.job import Job
from stages.memory.planner import plan_stage
from stages.memory.source import CheckpointSource
from stages.memory.tensors import read_tensors
from stages.models.checkpoint import Checkpoint, CheckpointError
from stages.models.loading import build
from stages.plans import ModelPlan, StagePlan
from stages.workflow import planning
from stages.workflow.identity import model_identity
from stages.workflow.model import check_path
from stages.workflow.store import Store

WEIGHTS, T5 = "transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def folder(small: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    to = tmp_path_factory.mktemp("flux")
    small_flux.write(to, small("sd15") / "tokenizer", head=128, joint=256)
    return to


class Stored(NamedTuple):
    """A file of quantised weights, and the numbers that they are."""

    path: Path
    numbers: dict[str, Tensor]


@pytest.fixture(scope="module", params=["Q4_K", "Q8_0", "F8_E4M3"])
def stored(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: Any) -> Stored:
    return store(request.param, folder, tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def gguf(folder: Path, tmp_path_factory: Any) -> Stored:
    return store("Q4_K", folder, tmp_path_factory.mktemp("gguf"))


def store(kind: str, folder: Path, to: Path) -> Stored:
    """The transformer in the original layout; its large weights quantised."""
    weights, numbers, raw = load_file(folder / WEIGHTS), {}, {}
    eight = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}.get(kind)
    for seed, (name, value) in enumerate(sorted(weights.items())):
        if value.dim() < 2 or value.shape[1] % 256:
            raw[name] = numbers[name] = value
        elif eight:
            raw[name] = (value / scale(name)).to(eight)
            numbers[name] = raw[name].float() * scale(name)
        else:
            drawn = blocks(kind, tuple(value.shape), seed, float(value.std()))
            raw[name] = torch.from_numpy(drawn)
            numbers[name] = torch.from_numpy(dequantize(drawn, GGMLQuantizationType[kind]))
    original = originally(raw)
    if eight:
        scales = {
            name.replace(".weight", ".scale_weight"): torch.tensor(scale(name))
            for name, value in original.items()
            if value.dtype == eight
        }
        save_file({**original, **scales, "scaled_fp8": torch.empty(0, dtype=eight)}, to / "flux.safetensors")
        return Stored(to / "flux.safetensors", numbers)
    arrays: dict[str, tuple[np.ndarray[Any, Any], str]] = {
        name: (value.numpy(), kind if value.dtype == torch.uint8 else "F32") for name, value in original.items()
    }
    write_gguf(to / "flux.gguf", arrays)
    return Stored(to / "flux.gguf", numbers)


def scale(name: str) -> float:
    """Of a block, whatever it is called."""
    block = re.search(r"_blocks\.(\d)\.", name)
    return 0.5 + int(block[1]) if block else 1.0


def canvas(work: Work, values: dict[str, Any], plan: dict[str, StagePlan] | None = None) -> Tensor:
    found = work.run({**ONE_TILE, **values}, until="denoise", plan=plan)
    return read_tensors(found["denoise"] / "canvas.safetensors")["latents"]


def test_canvas(folder: Path, stored: Stored, tmp_path: Path) -> None:
    """Equal to the stock pipeline with the dequantised weights; block by block the same bits."""
    pipeline: Any = FluxPipeline.from_pretrained(folder)
    pipeline.transformer.load_state_dict(stored.numbers)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.5, "width": 128, "height": 64}
    found = pipeline(**given, generator=torch.Generator().manual_seed(7), output_type="latent").images
    want = FluxPipeline._unpack_latents(found, 64, 128, 8)
    values = {"model.denoiser": str(stored.path)}
    got = canvas(Work(tmp_path / "resident", folder), values)
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-4 * want.std()
    plan = ModelPlan(resident=(), unit_limit=0, ring_bytes=4_000_000)
    streamed = {"denoise": StagePlan(models={"transformer": plan}, micro_batch=1, group_size=1)}
    assert torch.equal(canvas(Work(tmp_path / "streamed", folder), values, streamed), got)
    assert not torch.allclose(canvas(Work(tmp_path / "resident", folder), {}), got, atol=1e-2)  # another model


def test_bytes_of_a_pass(folder: Path, stored: Stored) -> None:
    """As many as the file has, whatever they become."""
    files = {"transformer": str(stored.path)}
    component = Checkpoint.open(str(folder), components=("transformer",), files=files).component("transformer")
    for dtype in (torch.float32, torch.bfloat16):
        built = build(component, dtype=dtype, blocks=FAMILY.blocks("transformer"))
        source = CheckpointSource(built.tensors)
        packed = torch.empty(built.layout.nbytes, dtype=torch.uint8)
        source.read(list(built.layout.slots.values()), 0, packed)
        for name, slot in built.layout.slots.items():
            assert torch.equal(slot.view(packed, 0), stored.numbers[name].to(dtype)), name
        data = sum(ref.nbytes for ref in component.tensors.values())
        assert source.nbytes == data and 0 <= stored.path.stat().st_size - data < 20_000  # its header and scales
        assert data < 0.4 * 4 * sum(value.numel() for value in stored.numbers.values())
        source.close()


@pytest.fixture(scope="module")
def described(folder: Path, tmp_path_factory: Any) -> Path:
    """The folder without any weights."""
    to = tmp_path_factory.mktemp("described") / "flux"
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))


def test_everything_in_one_file(folder: Path, described: Path, tmp_path: Path) -> None:
    """As ComfyUI writes it, T5 in eight bits: the canvas and the preview of the folder with the same numbers."""
    found = {f"model.diffusion_model.{name}": value for name, value in originally(load_file(folder / WEIGHTS)).items()}
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        conv = value[..., None, None] if ".attentions." in name and value.dim() == 2 else value
        found[f"vae.{vae_name(name, 4)}"] = conv.contiguous()
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        found[f"text_encoders.clip_l.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(folder / T5).items() if value.dim() == 2}
    for name, value in load_file(folder / T5).items():
        found[f"text_encoders.t5xxl.transformer.{name}"] = eight.get(name, value)
    save_file(found, tmp_path / "all.safetensors")
    rounded = shutil.copytree(folder, tmp_path / "rounded")
    save_file(load_file(folder / T5) | {name: value.float() for name, value in eight.items()}, rounded / T5)
    values = {"guide.mode": "sdedit", "denoise.strength": 0.5, "lowres.num_inference_steps": 1}
    want = canvas(Work(tmp_path / "want", rounded), values)
    got = canvas(Work(tmp_path / "got", tmp_path / "all.safetensors"), values | {"model.config": str(described)})
    assert torch.equal(got, want)
    work = Work(tmp_path / "alone", tmp_path / "all.safetensors")
    with pytest.raises(CheckpointError, match=r"those of its family are not built in: .*model\.config=FOLDER"):
        work.run(ONE_TILE, until="text_encode")


def test_weights_that_its_folder_lacks(folder: Path, described: Path, gguf: Stored, tmp_path: Path) -> None:
    """``model.denoiser`` or ``model.path`` and ``model.config``: the same model, whatever transformer lies there."""
    files = {"transformer": str(gguf.path)}
    one = Checkpoint.open(str(described), components=("transformer", "vae"), files=files)
    other = Checkpoint.open(str(gguf.path), components=("transformer", "vae"), config=str(folder))
    assert one.component("transformer") == other.component("transformer")
    assert other.component("vae") == Checkpoint.open(str(folder)).component("vae")
    with pytest.raises(CheckpointError, match=r"no VAE, text encoder in it .*model.path=FOLDER model.denoiser=FILE"):
        Checkpoint.open(str(gguf.path))
    torn = Checkpoint.open(str(gguf.path), config=str(described))
    with pytest.raises(CheckpointError, match=r"no vae in it, nor in"):
        torn.component("vae")


def test_what_is_read_is_in_the_fingerprint(folder: Path, gguf: Stored, tmp_path: Path) -> None:
    def identity(file: Path | None, *components: str) -> dict[str, str]:
        values = {**ONE_TILE, "model.denoiser": None if file is None else str(file)}
        return model_identity(Work(tmp_path, own).config(values), components, tmp_path / "cache")

    own = shutil.copytree(folder, tmp_path / "own")
    copy = Path(shutil.copy(gguf.path, tmp_path / "copy"))
    plain, first = identity(None, "transformer", "vae"), identity(copy, "transformer", "vae")
    assert plain.keys() | {"denoiser"} == first.keys() and plain["vae"] == first["vae"]
    assert plain["transformer"] != first["transformer"] and identity(copy, "vae") == identity(None, "vae")
    (own / WEIGHTS).unlink()  # nobody reads it
    assert identity(copy, "transformer", "vae") == first
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert identity(copy, "transformer")["denoiser"] != first["denoiser"]


def test_refused_before_any_work(folder: Path, gguf: Stored, tmp_path: Path) -> None:
    def of(path: Path) -> DictConfig:
        return Work(tmp_path, folder).config({**ONE_TILE, "model.denoiser": str(path)})

    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(3))
    (tmp_path / "page.gguf").write_bytes(b"<html>")
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    for name, said in {
        "torn.gguf": "its header is torn",
        "page.gguf": "it is a web page",
        "model.ckpt": "expected a .safetensors or .gguf file with a UNet or a transformer. Unpickling",
        "none.gguf": "expected a .safetensors or .gguf file",
    }.items():
        with pytest.raises(ConfigError, match=f"model.denoiser: got .*{said}"):
            check_path(of(tmp_path / name))
    check_path(of(gguf.path))

    def built(**tensors: Any) -> None:
        write_gguf(tmp_path / "other.gguf", tensors, "llama")
        files = {"transformer": str(tmp_path / "other.gguf")}
        Checkpoint.open(str(folder), components=("transformer",), files=files).component("transformer").build()

    with pytest.raises(CheckpointError, match=r"with 1 tensors such as token_embd, expected those of a FluxTransf"):
        built(token_embd=(np.zeros((2, 2), np.float32), "F32"))
    with pytest.raises(CheckpointError, match=r"of another shape \(proj_out.weight: file \[2, 2\], model \[64, 256\]"):
        built(**{"proj_out.weight": (np.zeros((2, 2), np.float32), "F32")})
    with pytest.raises(CheckpointError, match=r"1 tensors of a kind that is not read here \(proj_out.weight I8\)"):
        built(**{"proj_out.weight": (np.zeros((64, 256), np.int8), "I8")})
    with pytest.raises(CheckpointError, match=r"not read here \(proj_out.weight IQ1_S\); expected one of F64, F32"):
        built(**{"proj_out.weight": (np.zeros((64, 50), np.uint8), "IQ1_S")})


def test_no_copy_of_quantised_weights(folder: Path, gguf: Stored, tmp_path: Path) -> None:
    """The look says that they are, and the plan names no prepared file."""
    config = Work(tmp_path, folder).config({**ONE_TILE, "model.denoiser": str(gguf.path)})
    profile = look(config, "denoise")["denoise"]
    (model,) = profile.models
    assert model.quantised
    stage = next(stage for stage in PIPELINE if stage.name == "denoise")
    for one, copied in ((model, False), (replace(model, quantised=False), True)):
        found = replace(profile, models=(replace(one, steps=3),))
        chosen = plan_stage(found, 10**11, 0, "streamed")  # this process may be large
        plan = planning._plan(chosen, found, stage, Job.of(config), Store(tmp_path / "store"), 0)
        assert (plan.models["transformer"].prepared is not None) is copied
