"""Pictures of the model's native size for many prompts, by the stages' own code: many pictures lie on one canvas.

Each picture is a tile of its own with the noise of its own seed, so that it is what the default run's ``lowres`` makes
of that prompt and seed, up to the rounding of batches. A picture says in its PNG what it was made of: what is there
already is not made again, so a command that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from benchmarks._quality_scenes import TOGETHER, batches
from stages import PIPELINE, text_encode
from stages.canvas.mixture import View
from stages.canvas.weights import grid_weights
from stages.config import ROOT
from stages.context import StageContext
from stages.families.opening import open_vae
from stages.files import atomic_path
from stages.job import Job
from stages.regions.types import Region, Regions, Reroll
from stages.sampling import Canvas, sample
from stages.tiles import Size, Tile, whole
from stages.vae.tiled import decode_tile, to_uint8

ON_GPU = 64  # pictures that a GPU makes at a time
MADE_OF = "made of"  # the key of the PNG's text


def job_of(model: Path, *overrides: str) -> Job:
    """The default run's, of this model."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from stages.schema import Config
    from stages.workflow.complete import complete

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = ["model=embedded", f"model.path={model}", "preview.lowres=0", "prompt=scenes", *overrides]
        return complete(compose("config", overrides=own))


def digest(model: Path, overrides: Sequence[str] = ()) -> str:
    """Of all weights and configs of a model, and of what is asked of it besides."""
    found = hashlib.sha256(repr(sorted(overrides)).encode())
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        for file in sorted((model / part).iterdir()):
            found.update(file.read_bytes())
    return found.hexdigest()


def samples(model: Path, folder: Path, prompts: Sequence[str], *overrides: str, first_seed: int = 0) -> list[Path]:
    """A picture for each prompt, ``0000.png`` and so on in ``folder``, with the seeds from ``first_seed`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.png" for number in range(len(prompts))]
    key = digest(model, overrides)
    asked = [
        (path, prompt, first_seed + number, f"{key} {first_seed + number} {prompt}")
        for number, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
    ]
    missing = [one for one in asked if _made_of(one[0]) != one[3]]
    if not missing:
        return paths
    job = job_of(model, *overrides)
    for some in batches(missing, TOGETHER if job.config.device == "cpu" else ON_GPU):
        begin = time.monotonic()
        pixels = _made(job, [prompt for _, prompt, _, _ in some], [seed for _, _, seed, _ in some], folder)
        for (path, _, _, text), picture in zip(some, pixels, strict=True):
            note = PngInfo()
            note.add_itxt(MADE_OF, text)
            with atomic_path(path) as temporary:
                Image.fromarray(picture).save(temporary, format="PNG", pnginfo=note)
        print(f"{some[-1][0].relative_to(folder.parent)}, {time.monotonic() - begin:.0f} s a batch", flush=True)
    return paths


def _made_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        return str(getattr(picture, "text", {}).get(MADE_OF, ""))


@torch.inference_mode()
def _made(job: Job, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> np.ndarray:
    """``[n, H, W, 3]`` uint8."""
    config: Any = job.config
    f, count = config.model.vae_scale_factor, len(prompts)
    size = Size(config.lowres.height // f, config.lowres.width // f)
    tiles = [Tile(0, n, 0, n * size.width, size.height, (n + 1) * size.width) for n in range(count)]
    canvas = Size(size.height, count * size.width)
    with tempfile.TemporaryDirectory(dir=folder) as work:

        def context(name: str) -> StageContext:
            stage = next(stage for stage in PIPELINE if stage.name == name)
            texts = tuple(Region(box=tile.scaled(f), prompt=text) for tile, text in zip(tiles, prompts, strict=True))
            layout = Regions(size=canvas, factor=f, main=(prompts[0], ""), regions=texts[1:])
            output = Path(work) / name
            return StageContext(
                stage=stage,
                config=config,
                run_dir=Path(work),
                output=output,
                inputs={"text_encode": Path(work) / "text_encode"},
                layout=layout,
            )

        text_encode.run(context("text_encode"))
        weights = grid_weights(tiles, canvas, "constant")
        scale = config.lowres.guidance_scale
        views = [View(tile, weights[row], row, scale) for row, tile in enumerate(tiles)]
        rerolls = tuple(Reroll(tile, seed) for tile, seed in zip(tiles, seeds, strict=True))
        sampler = sample(
            context("lowres"), Canvas(canvas, views, rerolls), num_inference_steps=config.lowres.num_inference_steps
        )
        latents = torch.cat([rows for _, rows in sampler.latents()], dim=2)
        each = torch.cat([latents[tile.index] for tile in tiles])
        with open_vae(context("guide"), decoder=True) as streamer:
            pixels = torch.cat([decode_tile(streamer.model, one[None], whole(size)) for one in each])
    return to_uint8(pixels).permute(0, 2, 3, 1).numpy()


def read(path: Path) -> Tensor:
    """A picture file as ``[1,3,H,W]`` in [-1,1]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_all(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Picture files of one size, a few at a time."""
    for some in batches(paths):
        yield torch.cat([read(path) for path in some])
