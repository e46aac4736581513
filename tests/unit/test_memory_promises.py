"""Memory that no number of a picture shows: figures of the full-size Stable Diffusion 1.5 on meta, and their reasons.

A figure here changes with the installed diffusers and transformers; take the new one over only when it is known why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linfusions
import pytest
import torch
from in_process import small_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.config import ROOT
from stages.families import family_of
from stages.memory import copies
from stages.memory.source import CheckpointSource
from stages.memory.tensors import TensorRef
from stages.memory.trace import trace
from stages.memory.units import Unit, rungs, split_units
from stages.models import loading
from stages.models.checkpoint import Checkpoint
from stages.models.component import Component, construct
from stages.models.loading import Built, build, open_model
from stages.plans import ModelPlan
from stages.techniques import techniques_of
from stages.tiles import Size
from stages.vae.exact_program import program
from stages.vae.strips import prepared
from stages.workflow.launch.local import environment

CONFIGS = ROOT / "stages" / "models" / "configs" / "sd15"
STAGES = {"text_encoder": "text_encode", "unet": "denoise", "vae": "decode"}
MB = 1e6


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return small_config(CONFIGS, tmp_path, {"technique.dtype": "bf16"})


def opened(name: str, config: Any, drop: tuple[str, ...] = ()) -> Built:
    """A full-size component in bf16 by the way that running and looking share; its tensors lie nowhere."""
    checkpoint = Checkpoint(CONFIGS)
    described = checkpoint.config(name)
    kind = described.get("_class_name") or described["architectures"][0]
    refs = {
        key: TensorRef(Path("/nowhere"), 0, torch.bfloat16, tuple(value.shape))
        for key, value in construct(kind, described).state_dict().items()
    }
    component = Component(name=name, class_name=kind, config=described, tensors=refs)
    blocks, techniques = family_of(config).blocks(name), techniques_of(config, STAGES[name])
    return build(component, dtype=torch.bfloat16, blocks=blocks, techniques=techniques, drop=drop)


def cut(built: Built, limit: int, stage_limit: int = 0) -> list[Unit]:
    return split_units(built.network, built.layout, built.blocks, limit, stage_limit)


def peak(built: Built, call: Callable[[nn.Module], Any], micro_batch: int = 0) -> float:
    """MB of activations that are alive at most in one pass, blocks whole."""
    network = built.network.to(torch.bfloat16)
    found = trace(network, cut(built, built.layout.nbytes), lambda: call(network), micro_batch)
    return max(event.live for event in found.events) / MB


def test_activations_of_one_pass_of_the_unet(config: Any) -> None:
    """One pair of 64x64 latents: on the way up a residual block takes 960 channels, and holds most where convolutions
    in bf16 take weights in blocks; elsewhere attention does. A gated layer, 8 x 320 wide for 2 x 64 x 64 tokens, would
    hold 115.9 MB, did it take all of its rows at once."""
    built = opened("unet", config)
    most = 73.95 if hasattr(built.network.get_submodule("up_blocks.3.resnets.0.conv1"), "block") else 68.90
    assert denoiser_peak(built, config) == pytest.approx(in_rows(most), rel=0.005)


def in_rows(found: float) -> float:
    """MB, where this machine's products in bf16 let feed-forwards take some rows at a time."""
    return found if copies._rows_alone(320, copies._ASKED) else 115.89


def denoiser_peak(built: Built, config: Any) -> float:
    """MB of activations of a pair of 64x64 latents."""
    family, side = family_of(config), Size(64, 64)
    batch, embeds = family.example(Checkpoint(CONFIGS).config("unet"), side, 2)

    def call(network: nn.Module) -> Any:
        denoiser = family.denoiser(
            network,
            embeds,
            config,
            canvas=side,
            dtype=torch.bfloat16,
            device="meta",
            techniques=techniques_of(config, "denoise"),
        )
        return denoiser(batch, torch.empty((), device="meta"))

    return peak(built, call, 2)


def test_linear_attention_of_the_unet(config: Any, tmp_path: Path) -> None:
    """Eight matrices a layer instead of four, and activations that are not more: never cut inside of a product."""
    config.technique.linfusion.path = str(linfusions.write_hollow(tmp_path / "linear", opened("unet", config).network))
    built = opened("unet", config)
    assert built.layout.nbytes == 1_818_364_864
    whole, finest = cut(built, built.layout.nbytes), kinds(cut(built, 1))
    assert not [unit.name for unit in whole if "keys" in unit.name] and finest["LinearKeys"] == 16
    assert finest["LinearQueries"] == 16 and "LayerNorm" in finest
    assert denoiser_peak(built, config) == pytest.approx(in_rows(74.0), rel=0.005)


def test_activations_of_one_decode_and_one_encode(config: Any) -> None:
    """Of 512x512 pixels. Each would hold one activation more if residual blocks made copies: 402.7 and 335.5 MB."""
    built = opened("vae", config)
    latents = torch.empty((1, 4, 64, 64), dtype=torch.bfloat16, device="meta")
    pixels = torch.empty((1, 3, 512, 512), dtype=torch.bfloat16, device="meta")
    assert peak(built, lambda vae: vae.decode(latents, return_dict=False)) == pytest.approx(369.13, rel=0.005)
    assert peak(built, lambda vae: vae.encode(pixels, return_dict=False)) == pytest.approx(268.44, rel=0.005)


def test_activations_of_one_pair_of_prompts(config: Any) -> None:
    call, _ = family_of(config).text_call("text_encoder", Checkpoint(CONFIGS).config("text_encoder"))
    assert peak(opened("text_encoder", config), call) == pytest.approx(3.79, rel=0.005)


def kinds(units: list[Unit]) -> dict[str, int]:
    return dict(Counter(type(unit.module).__name__ for unit in units))


def test_units_of_the_unet(config: Any) -> None:
    built = opened("unet", config)
    network, layout, _, blocks = built
    assert layout.nbytes == 1_719_041_984
    assert rungs(network, layout, blocks) == [1_719_041_984, 69_521_920, 58_984_960]
    whole = cut(built, layout.nbytes)
    assert kinds(whole) == {
        "ResnetBlock2D": 22,
        "Transformer2DModel": 16,
        "Downsample2D": 3,
        "Upsample2D": 3,
        "Conv2d": 2,
        "Linear": 2,
        "GroupNorm": 1,
    }
    nbytes = {unit.name: unit.nbytes for unit in whole}
    assert nbytes["conv_in"] == 23_680 and nbytes["mid_block.attentions.0"] == 69_521_920
    assert max(nbytes.values()) == nbytes["up_blocks.1.resnets.1"] == 98_329_600
    fine = kinds(cut(built, 58_984_960))
    assert {name: fine[name] for name in ("Attention", "FeedForward", "LayerNorm")} == {
        "Attention": 12,
        "FeedForward": 6,
        "LayerNorm": 18,
    }
    assert kinds(cut(built, 65_000_000))["BasicTransformerBlock"] == 6
    stages = cut(built, layout.nbytes, stage_limit=100_000_000)
    assert kinds(stages)["CrossAttnDownBlock2D"] == 2 and kinds(stages)["CrossAttnUpBlock2D"] == 1
    assert blocks.parked(network, stages) == ("conv_in", "down_blocks.0")


def test_units_of_the_text_encoder(config: Any) -> None:
    built = opened("text_encoder", config)
    assert rungs(built.network, built.layout, built.blocks) == [170_230_272, 4_724_736]
    units = cut(built, built.layout.nbytes)
    assert kinds(units) == {"Embedding": 1, "CLIPEncoderLayer": 12, "LayerNorm": 1}
    assert {unit.nbytes for unit in units if isinstance(unit.module, nn.Module) and "layers." in unit.name} == {
        14_175_744
    }


def test_units_of_the_vae(config: Any) -> None:
    built = opened("vae", config)
    assert rungs(built.network, built.layout, built.blocks) == [167_307_968, 7_346_176, 4_719_616]
    assert kinds(cut(built, built.layout.nbytes)) == {
        "ResnetBlock2D": 24,
        "Attention": 2,
        "Downsample2D": 3,
        "Upsample2D": 3,
        "Conv2d": 6,
        "GroupNorm": 2,
    }
    half = opened("vae", config, drop=("encoder", "quant_conv"))
    assert half.layout.nbytes == 98_980_544 and not any("encoder" in unit.name for unit in cut(half, 10**9))


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def tf32_kept() -> Iterator[None]:
    before = tf32()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32_kept")
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", list(STAGES))
def test_tf32_is_set_whatever_it_was(config: Any, name: str, on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not on
    config.technique.tf32 = on
    opened(name, config)
    assert tf32() == (on, on)


def files_mapped() -> set[str]:
    """Files that this process has mapped; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split(maxsplit=5)[5] for line in lines if line.count("/")}


@pytest.fixture
def text_encoder(small: Callable[[str], Path]) -> Component:
    return Checkpoint.open(str(small("sd15"))).component("text_encoder")


def run_text_encoder(component: Component, config: Any, plan: ModelPlan) -> Tensor:
    blocks, ids = family_of(config).blocks("text_encoder"), torch.arange(77).view(1, 77)
    before = files_mapped()  # by stock pipelines of other tests
    with open_model(component, dtype=torch.float32, blocks=blocks, plan=plan) as streamer:
        found = streamer.model(ids)[0].clone()
        weights = {str(ref.file.resolve()) for ref in component.tensors.values()} | {str(plan.prepared)}
        assert not (files_mapped() - before) & weights
    return found


def test_weights_are_read_never_mapped_and_code_pages_go_first(
    text_encoder: Component, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading, "drop_clean_pages", lambda: said.append("drop"))
    read = CheckpointSource.read

    def counted(self: CheckpointSource, *arguments: Any) -> None:
        said.append("read")
        read(self, *arguments)

    monkeypatch.setattr(CheckpointSource, "read", counted)
    for plan in (ModelPlan(), ModelPlan(resident=(), unit_limit=10**9, ring_bytes=10**6)):
        said.clear()
        assert run_text_encoder(text_encoder, config, plan).isfinite().all()
        assert said[0] == "drop" and said.count("drop") == 1 and "read" in said


def test_the_prepared_copy_is_used_once_it_is_there(
    text_encoder: Component, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_text_encoder(text_encoder, config, ModelPlan())
    plan = ModelPlan(resident=(), unit_limit=10**9, ring_bytes=10**6, prepared=str(tmp_path / "copy.bin"))
    assert torch.equal(run_text_encoder(text_encoder, config, plan), expected)

    def read(*arguments: Any) -> None:
        raise AssertionError("the checkpoint was read again")

    monkeypatch.setattr(CheckpointSource, "read", read)
    assert torch.equal(run_text_encoder(text_encoder, config, plan), expected)


class Ops(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_strips_are_activated_in_place(config: Any) -> None:
    vae: Any = opened("vae", config).network
    (layer,) = [one for one in program(vae, "decode") if one.name == "decoder.up_blocks.3.resnets.2.conv2"]
    strip = torch.empty((1, 128, 8, 16), dtype=torch.bfloat16, device="meta")
    with Ops() as ops:
        prepared(layer, strip, (torch.ones(32), torch.zeros(32)))
    assert "silu_" in ops.names and "silu" not in ops.names


def test_glibc_hands_memory_back(make_config: Callable[..., Any]) -> None:
    given = environment(make_config())
    assert given["MALLOC_MMAP_THRESHOLD_"] == given["MALLOC_TRIM_THRESHOLD_"] == "131072"
    assert given["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert "hugetlb=1" in given["GLIBC_TUNABLES"]
