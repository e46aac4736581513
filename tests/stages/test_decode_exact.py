"""The decode stage in mode exact: the whole-image decode, cut in tiles; killed and gone on with; streamed weights."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from files import flip
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from stages import PIPELINE, decode
from stages.config import resolve
from stages.context import Progress, StageContext
from stages.events import Advance, Note, Start
from stages.memory import disk
from stages.plans import ModelPlan, StagePlan
from stages.schema import Config
from stages.tiles import latent_grid
from stages.vae import exact, exact_size
from stages.vae.tiled import to_uint8

WIDTH, HEIGHT = 168, 120
STREAMED = ModelPlan(resident=(), unit_limit=20_000, ring_bytes=200_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    vae.save_pretrained(folder / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, vae


@pytest.fixture
def context(checkpoint, tmp_path):
    folder, _ = checkpoint
    written = {
        "prompt": "x",
        "width": WIDTH,
        "height": HEIGHT,
        "model": {"name": "tiny", "family": "sd", "path": str(folder), "native_size": 64},
        "scheduler": {"name": "ddim"},
        "decode": {"mode": "exact", "tile_size": 64, "overlap": 16},
        "technique": {"dtype": "fp32"},
    }
    config = resolve(OmegaConf.merge(OmegaConf.structured(Config), written))
    latents = torch.randn((1, 4, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(1))
    (tmp_path / "denoise").mkdir()
    (tmp_path / "decode" / "0").mkdir(parents=True)
    save_file({"latents": latents}, tmp_path / "denoise" / "canvas.safetensors")
    return StageContext(
        stage=PIPELINE[-2],
        config=config,
        run_dir=tmp_path,
        output=tmp_path / "decode" / "0",
        inputs={"denoise": tmp_path / "denoise"},
    )


def worst(context, vae):
    """The largest difference of any tile from the whole-image decode, in 8-bit levels."""
    latents = load_file(context.inputs["denoise"] / "canvas.safetensors")["latents"]
    with torch.no_grad():
        whole = to_uint8(vae.decode(latents / vae.config.scaling_factor).sample)[0].int()
    found = 0
    for tile in latent_grid(WIDTH, HEIGHT, 64, 16, 8):
        pixels = load_file(context.output / "tiles" / f"{tile.name}.safetensors")["pixels"]
        found = max(found, int((pixels.int() - whole[tile.scaled(8).index]).abs().max()))
    return found


@pytest.mark.parametrize("plan", [ModelPlan(), STREAMED, replace(STREAMED, unit_limit=5_000)])
@pytest.mark.parametrize("strip_bytes", [50_000, exact_size.STRIP_BYTES])
def test_tiles_of_the_whole_decode(context, checkpoint, plan, strip_bytes, monkeypatch):
    monkeypatch.setitem(exact.ExactPass.__init__.__kwdefaults__, "working_bytes", strip_bytes)
    context.plan = StagePlan(models={"vae": plan})
    events = []
    context.progress = Progress(events.append)
    decode.run(context)
    context.progress.flush()
    assert worst(context, checkpoint[1]) <= 1
    assert not [path for path in (context.output / "checkpoint_exact_decode").iterdir() if path.suffix == ".raw"]
    started = next(event for event in events if isinstance(event, Start))
    assert started.unit == "layers"
    assert sum(event.n for event in events if isinstance(event, Advance)) == started.total
    assert any("scratch space" in event.text for event in events if isinstance(event, Note))


class Killed(Exception):
    """Stands for SIGKILL in a place of our choice."""


def test_killed_in_a_layer_and_between_tiles(context, checkpoint, monkeypatch):
    ran = []

    def mark(name, stop=None):
        if stop and name.endswith(stop):
            raise Killed
        if name.startswith("decoder.") and ran[-1:] != [name]:
            ran.append(name)

    monkeypatch.setattr(context.progress, "mark", lambda name: mark(name, "up_blocks.1.resnets.0.conv1"))
    with pytest.raises(Killed):
        decode.run(context)
    done = exact.layers_done(context.output / "checkpoint_exact_decode")
    assert done > 5 and not (context.output / "tiles").exists()
    monkeypatch.setattr(context.progress, "mark", mark)

    written, write = [], decode.write_tensors

    def fail_third(path, tensors, **options):
        if len(written) == 2:
            raise Killed
        written.append(path)
        write(path, tensors, **options)

    monkeypatch.setattr(decode, "write_tensors", fail_third)
    with pytest.raises(Killed):
        decode.run(context)
    assert context.progress.resumed_because.startswith(f"layer {done} of")
    layers = len(ran)
    monkeypatch.setattr(decode, "write_tensors", write)
    decode.run(context)
    assert len(ran) == layers  # no layer ran again
    assert worst(context, checkpoint[1]) <= 1


def test_a_full_disk_is_refused_before_the_work(context, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match=r"decode needs .* GB of scratch space, 0\.0 GB are free.*decode\.mode=shared"):
        decode.run(context)


def test_a_damaged_activation_is_made_again(context, checkpoint, monkeypatch):
    def stop(name):
        if name.endswith("up_blocks.0.resnets.0.conv1"):
            raise Killed

    monkeypatch.setattr(context.progress, "mark", stop)
    with pytest.raises(Killed):
        decode.run(context)
    monkeypatch.undo()
    for file in (context.output / "checkpoint_exact_decode").glob("*.raw"):
        flip(file, 0.5)
    decode.run(context)
    assert worst(context, checkpoint[1]) <= 1
