"""Pixel tiles to one file: PNG always, tiled BigTIFF or Deep Zoom beside it when asked. No torch, no whole picture."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stages import PIPELINE
from stages.context import StageContext
from stages.files import atomic_path, write_json
from stages.picture.png import PngWriter
from stages.picture.pyramid import Pyramid
from stages.picture.seam_map import heat_map, plain
from stages.picture.seams import Gradients, Meter, judge
from stages.picture.tile_strips import TileStrips
from stages.techniques import TECHNIQUES
from stages.techniques.controls import KEY as CONTROLNETS
from stages.techniques.controls import controls
from stages.techniques.inversion_file import KEY as EMBEDDINGS
from stages.techniques.inversion_file import inversions
from stages.techniques.lora_file import KEY as LORAS
from stages.techniques.lora_file import strengths
from stages.tiles import Size, latent_grid
from stages.workflow.store import CHECKPOINT

ZOOM = "zoom"  # the folder of the picture's tiles
OF_THE_MODEL = ("model.native_size", "model.vae_scale_factor", "model.latent_channels", "model.patch")  # it says so
# say nothing about the picture to someone else, and too much about whose it is
PATHS = ("guide.image", "technique.linfusion.path")


def settings(config: DictConfig) -> dict[str, Any]:
    """What decided the picture, as nested plain values: the parameters of every stage that took part. No paths."""
    stages = {stage.name: stage for stage in PIPELINE}
    waiting, found = ["stitch"], {}
    while waiting:
        stage = stages[waiting.pop()]
        found[stage.name] = stage
        waiting += stage.needs(config)
    chosen = OmegaConf.create({})
    keys = {key for stage in found.values() for key in stage.parameters}
    on = [technique for technique in TECHNIQUES if technique.decides and technique.of(config) is not None]
    keys = keys.union(*(technique.keys for technique in on)) - {*PATHS, *OF_THE_MODEL}
    if "guide.fit" in keys and not config.guide.image:  # says nothing of a picture that nobody gave
        keys -= {"guide.fit"}
    if config.prompt_weighting == "auto":
        keys -= {"prompt_weighting"}
    for key in sorted(keys - {LORAS, CONTROLNETS, EMBEDDINGS}):
        OmegaConf.update(chosen, key, OmegaConf.select(config, key), force_add=True)
    if "guide.upscale" in keys:
        OmegaConf.update(chosen, "guide.upscale", Path(config.guide.upscale).name)
    if loras := [{"name": Path(one.path).stem, "scale": one.scale} for one in strengths(config)]:
        OmegaConf.update(chosen, LORAS, loras, force_add=True)
    if words := [one.name for one in inversions(config)]:
        OmegaConf.update(chosen, EMBEDDINGS, words, force_add=True)
    if nets := [one.said for one in controls(config)]:
        OmegaConf.update(chosen, CONTROLNETS, nets, force_add=True)
    return OmegaConf.to_container(chosen, resolve=False)  # type: ignore[return-value]


def parameters(config: DictConfig) -> str:
    """The settings as AUTOMATIC1111's web UI writes them and many programs read them."""
    denoise = config.denoise
    lines = [" ".join([config.prompt or "", *(one.tag for one in strengths(config))])]
    if config.negative_prompt:
        lines.append(f"Negative prompt: {config.negative_prompt}")
    values = {
        "Steps": denoise.num_inference_steps,
        "Sampler": config.scheduler.name,
        "CFG scale": denoise.guidance_scale,
        "Seed": config.seed,
        "Size": f"{config.width}x{config.height}",
        "Model": config.model.name,
        "Denoising strength": 1.0 if config.guide.mode == "none" else denoise.strength,
        "Tile size": denoise.tile_size,
        "Tile overlap": denoise.overlap,
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in values.items())])


def run(context: StageContext) -> dict[str, Any]:
    """Blend ``decode/tiles`` into ``image.png``; beside it ``zoom/``, the same for the report's viewer, ``seams.json``
    and maps: how visible the tiles' borders are.

    Raises:
        ValueError: a tile is missing or is no tile of this canvas.
    """
    config = context.config
    factor = config.model.vae_scale_factor
    grid = latent_grid(config.width, config.height, config.decode.tile_size, config.decode.overlap, factor)
    tiles = [tile.scaled(factor) for tile in grid]
    texts = {
        "parameters": parameters(config),
        "highres_lowram": json.dumps(settings(config), ensure_ascii=False, sort_keys=True),
    }
    image, meter = context.output / "image.png", Meter(Size(config.height, config.width))
    threads = config.launch.threads or os.cpu_count() or 1
    zoom = context.output / f"{CHECKPOINT}-zoom"  # a tree of files: moved into place when whole
    shutil.rmtree(zoom, ignore_errors=True)
    try:
        strips = TileStrips(context.inputs["decode"] / "tiles", tiles)
        with atomic_path(image) as temporary:
            context.progress.start(len(strips), "strips")
            with (
                open(temporary, "wb") as file,
                PngWriter(
                    file, config.width, config.height, texts=texts, level=config.stitch.compression, threads=threads
                ) as png,
                Pyramid(zoom, config.width, config.height) as pyramid,
            ):
                for strip in strips:
                    context.progress.mark("blend")
                    png.write(strip)
                    pyramid.write(strip)
                    meter.add(strip)
                    context.progress.advance()
    except ValueError as error:
        hint = f"Make the tiles again: python runner.py run={config.run} stage=decode force=true"
        raise ValueError(f"stitch: {error}. {hint}") from error
    shutil.rmtree(context.output / ZOOM, ignore_errors=True)
    os.replace(zoom, context.output / ZOOM)
    write_seams(context, meter.gradients())
    if config.stitch.format != "png":
        context.progress.mark(config.stitch.format)
        convert(image, config.stitch.format)
    return {"width": config.width, "height": config.height, "tiles": len(tiles)}


def write_seams(context: StageContext, gradients: Gradients) -> None:
    """``seams.json`` (``{grid: ratios and borders}``) and ``seams_<grid>.png`` of the denoise and the decode tiles.

    Regions have tiles of their own, whose borders are not those of one grid: then only the decode tiles'.
    """
    config, found = context.config, {}
    factor = config.model.vae_scale_factor
    for name in ("decode",) if config.regions else ("denoise", "decode"):
        node = config[name]
        tiles = latent_grid(config.width, config.height, node.tile_size, node.overlap, factor)
        if len(tiles) > 1:
            report = judge(gradients, [tile.scaled(factor) for tile in tiles], factor)
            found[name] = plain(report)
            with atomic_path(context.output / f"seams_{name}.png") as temporary:
                temporary.write_bytes(heat_map(report, side=480))
    write_json(context.output / "seams.json", found)


def convert(image: Path, kind: str) -> None:
    """Write ``image.tiff`` (BigTIFF, tiled) or ``image.dzi`` + ``image_files/`` beside a PNG, strip by strip."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")  # every libvips thread keeps bands of its own
    import pyvips

    pyvips.cache_set_max(0)
    source = pyvips.Image.new_from_file(str(image), access="sequential")
    if kind == "tiff":
        with atomic_path(image.with_suffix(".tiff")) as temporary:
            source.tiffsave(
                str(temporary), bigtiff=True, tile=True, tile_width=256, tile_height=256, compression="deflate"
            )
    elif kind == "deepzoom":
        work = image.with_name("checkpoint-deepzoom")  # a tree of files: moved into place when whole
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        source.dzsave(str(work / "image"), suffix=".png", overlap=1, tile_size=254)
        (work / "image_files" / "vips-properties.xml").unlink(missing_ok=True)  # holds the date
        shutil.rmtree(image.with_name("image_files"), ignore_errors=True)
        os.replace(work / "image_files", image.with_name("image_files"))
        os.replace(work / "image.dzi", image.with_suffix(".dzi"))
        work.rmdir()
    else:
        raise ValueError(f"stitch.format: got {kind!r}, expected png, tiff or deepzoom.")
